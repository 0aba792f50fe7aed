"""Omini2 Keep Unchanged: pixels to the last bit, and drift of a known size."""

import math
import re
from pathlib import Path
from typing import Any

import folder_paths
import nodes as host
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.refusals import refused, sentence
from PIL import Image
from tiny import LatentVae
from torch import Tensor

from omini2_extension.nodes import KeepUnchanged
from omini2_extension.omini2_core.tokens.drift import drift

SIZE = 256


def picture(seed: int = 0, side: int = SIZE) -> Tensor:
    """(1, side, side, 3), of 8 bits, with structure of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1, 3, side, side)
    for level in range(2, 7):
        noise = torch.rand(1, 3, 2**level, 2**level, generator=generator)
        total += F.interpolate(noise, size=(side, side), mode="bicubic") / level
    total = (total - total.amin()) / (total.amax() - total.amin())
    return (total.movedim(1, -1) * 255).round() / 255


def edited(reference: Tensor, *tokens: tuple[int, int]) -> dict[str, Tensor]:
    """A latent that is the reference's but for some tokens."""
    latent = LatentVae().encode(reference).clone()
    for row, column in tokens:
        latent[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 0.5
    return {"samples": latent}


def keep(image: Tensor, samples: Any, reference: Tensor, **options: Any) -> Any:
    return KeepUnchanged.execute(image, samples, reference, LatentVae(), **options).args


def test_untouched_pixels_are_the_references_in_the_png(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the host's own nodes for loading and saving."""
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    generator = np.random.default_rng(0)
    before = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(before).save(tmp_path / "before.png")
    reference = host.LoadImage().load_image("before.png")[0]
    result = (reference * 0.98 + 0.01).clamp(0, 1)  # as a VAE would change it
    kept, mask, _ = keep(result, edited(reference, (2, 3), (2, 4)), reference)
    saver = host.SaveImage()
    saver.output_dir = str(tmp_path)
    saver.save_images(kept, "after")
    after = np.asarray(Image.open(next(tmp_path.glob("after*.png"))))
    changed = mask[0].bool().numpy()
    assert changed.sum() == 2 * 16 * 16 and changed[2 * 16 : 3 * 16, 3 * 16 : 5 * 16].all()
    assert np.array_equal(after[~changed], before[~changed])
    assert not np.array_equal(after[changed], before[changed])


def test_feather_goes_inwards_only() -> None:
    reference = picture()
    result = 1 - reference
    samples = edited(reference, *((r, c) for r in range(4, 9) for c in range(4, 9)))
    kept, mask, _ = keep(result, samples, reference, feather=8)
    hard, _, _ = keep(result, samples, reference, feather=0)
    inside = mask[0].bool()
    assert torch.equal(kept[0][~inside], reference[0][~inside])
    assert torch.equal(hard[0][inside], result[0][inside])
    line = ((kept - reference) / (result - reference))[0, 100, 64:80, 0]
    assert torch.allclose(line[:9], torch.arange(1, 10) / 9, atol=1e-3)
    assert torch.allclose(line[9:], torch.ones(7), atol=1e-3)


def test_a_mask_says_what_may_have_changed() -> None:
    reference = picture()
    result = picture(1)
    samples = {"samples": LatentVae().encode(result)}
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, 30:50, 60:90] = 1
    kept, changed, said = keep(result, samples, reference, mask=mask, feather=0)
    assert torch.equal(changed, mask)
    assert torch.equal(kept[0, 30:50, 60:90], result[0, 30:50, 60:90])
    assert said.startswith(f"{100 * 600 / SIZE**2:.1f} % changed")


def moved(reference: Tensor, right: float, down: float, zoom: float) -> Tensor:
    """The same picture shifted, and zoomed around its middle, by the host's torch."""
    _, height, width, _ = reference.shape
    rows = (torch.arange(height) - (height - 1) / 2 - down) / zoom
    columns = (torch.arange(width) - (width - 1) / 2 - right) / zoom
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)
    grid = grid / (torch.tensor([width - 1, height - 1]) / 2)
    pixels = reference.movedim(-1, 1)
    out = F.grid_sample(
        pixels, grid[None].float(), mode="bicubic", padding_mode="reflection", align_corners=True
    )
    return out.movedim(1, -1)


MOVES = [(0, 0, 1), (3, -2, 1), (0.5, 0.25, 1), (0, 0, 1.01), (-4.3, 1.6, 0.99), (9, 6, 1.004)]


@pytest.mark.parametrize(("right", "down", "zoom"), MOVES)
def test_drift_is_measured(right: float, down: float, zoom: float) -> None:
    reference = picture(side=512)
    result = moved(reference, right, down, zoom)
    unchanged = torch.ones(512, 512, dtype=torch.bool)
    result[:, 100:200, 150:260] = picture(3, 512)[:, 100:200, 150:260]
    unchanged[100:200, 150:260] = False
    found = drift(result[0], reference[0], unchanged)
    assert found is not None
    assert math.isclose(found.right, right, abs_tol=0.15)
    assert math.isclose(found.down, down, abs_tol=0.15)
    assert math.isclose(found.zoom, zoom, abs_tol=1e-3)


def test_the_report_names_the_drift() -> None:
    reference = picture(side=512)
    result = moved(reference, 3, -2, 1)
    *_, said = keep(result, {"samples": LatentVae().encode(result)}, reference)
    numbers = re.findall(r"[+-]\d+\.\d+", said)
    assert "100.0 % changed; the whole picture moved by" in said
    assert math.isclose(float(numbers[0]), 3, abs_tol=0.15)
    assert math.isclose(float(numbers[1]), -2, abs_tol=0.15)


def test_too_little_to_measure_is_said() -> None:
    flat = torch.full((1, SIZE, SIZE, 3), 0.5)
    *_, said = keep(flat, edited(flat), flat)
    assert said == "0.0 % changed; the rest shows too little to measure a shift."


def test_a_batch_with_one_reference() -> None:
    reference = picture()
    latents = torch.cat((edited(reference)["samples"], edited(reference, (1, 1))["samples"]))
    results = torch.cat((picture(1), picture(2)))
    kept, mask, said = keep(results, {"samples": latents}, reference)
    assert torch.equal(kept[0], reference[0])
    assert mask.sum((1, 2)).tolist() == [0, 256]
    assert said.count("\n") == 1 and said.startswith("picture 1: 0.0 % changed")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reference": picture(side=128)}, "reference: .* after any resizing"),
        ({"reference": torch.zeros(1, 4)}, "reference: it is"),
        ({"samples": {"samples": torch.zeros(1, 16, 8, 9)}}, "samples: this latent isn't that"),
        ({"samples": {}}, "samples: this is no latent"),
        ({"feather": -1}, "feather: -1 is out of bounds"),
        ({"vae": LatentVae(torch.zeros(1, 8, 32, 32))}, "vae: it gives latents of shape"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: dict[str, Any], said: str) -> None:
    reference = picture()
    given = {
        "image": picture(1), "samples": edited(reference), "reference": reference,
        "vae": LatentVae(), **change,
    }  # fmt: skip
    with refused(said) as error:
        KeepUnchanged.execute(**given)
    sentence(error)

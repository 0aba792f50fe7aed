"""The demo model's LoRAs read what they are given: the right condition beats another scene's."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import folder_paths
import pytest
import torch
from torch import Tensor

from benchmarks.study import conditions
from dev.demo_model import scenes
from dev.demo_model import train_loras as runs
from omini2_extension import nodes
from omini2_extension.omini2_core.demo import model as demo_model

LORAS = demo_model.FOLDER / "loras"
COUNT, NOISE_LEVEL = 3, 0.9
# name -> task, compression; what of the picture was painted out needs no proof of being read
READ = {
    "edges": ("edges", 1.0),
    "edges_joint": ("edges", 1.0),
    "edges_compact": ("edges", 0.5),
    "edges_pruned": ("edges", 1.0),
    "depth": ("depth", 0.5),
    "deblurring": ("deblurring", 0.5),
    "colouring": ("colouring", 1.0),
    "inpainting_masked": ("inpainting", 0.5),
    "subject": ("subject", 1.0),
}


@pytest.fixture(scope="module")
def model() -> Iterator[tuple[Any, Any, Any]]:
    folders = folder_paths.folder_names_and_paths["loras"][0]
    before = list(folders)
    folder_paths.add_model_folder_path("loras", str(LORAS))
    folder_paths.filename_list_cache.pop("loras", None)
    with torch.inference_mode():
        yield demo_model.load()
    folders[:] = before
    folder_paths.filename_list_cache.pop("loras", None)


@pytest.fixture(scope="module")
def truths() -> list[Any]:
    return [conditions.truth(index, things=1) for index in range(COUNT)]


@pytest.fixture(scope="module")
def error(model: tuple[Any, Any, Any], truths: list[Any]) -> Callable[..., float]:
    """How far one step from noise to picture misses the true scenes, in latents; all or one."""
    _, clip, vae = model
    latent = vae.encode(conditions.condition_images("picture", truths))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))

    def error(patched: Any, subject: bool, only: int | None = None) -> float:
        say = scenes.subject_caption if subject else scenes.full_caption
        some = slice(None) if only is None else slice(only, only + 1)
        parts = [
            clip.encode_from_tokens(clip.tokenize(say(t.scene)), return_pooled=True)
            for t in truths[some]
        ]
        text, pooled = (torch.cat(part).float() for part in zip(*parts, strict=True))
        prompt = [[text, {"pooled_output": pooled, "guidance": 3.5}]]
        drawn = comfy.sample.sample_custom(
            patched, noise[some], 1.0, comfy.samplers.sampler_object("euler"),
            torch.tensor([NOISE_LEVEL, 0.0]), prompt, prompt, latent[some],
            disable_pbar=True, seed=0,
        )  # fmt: skip
        return float((drawn - latent[some]).square().mean())

    return error


@pytest.fixture(scope="module")
@torch.inference_mode()
def without(model: tuple[Any, Any, Any], error: Callable[..., float]) -> dict[bool, float]:
    """The error that each kind of caption leaves by itself: a subject's, and a whole scene's."""
    return {subject: error(model[0], subject) for subject in (False, True)}


def conditioned(model: tuple[Any, Any, Any], name: str, images: Tensor) -> Any:
    task, compression = READ[name]
    patcher, _, vae = model
    placement = "left" if task == "subject" else "aligned"
    condition = nodes.ConditionEncode.execute(images, vae, placement, 0, 0, 1.0)[0]
    prune = "empty" if name == "edges_pruned" else "off"
    condition = nodes.CompactTokens.execute(
        condition, compression, True, prune, 0.1, 0, False, None, False
    )[0]
    file = f"omini2_demo_{name}.safetensors"
    return nodes.ApplyLora.execute(patcher, condition, file, 1.0, 1.0, "auto", 0.0, 1.0)[0]


@pytest.mark.parametrize("name", READ)
@torch.inference_mode()
def test_the_right_condition_helps_more_than_another_scenes(
    name: str,
    model: tuple[Any, Any, Any],
    truths: list[Any],
    error: Callable[..., float],
    without: dict[bool, float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = READ[name][0]
    subject = task == "subject"
    side = runs.SUBJECT_SIDE if subject else runs.SIDE
    images = conditions.condition_images(task, truths, side)
    # Pruned, all conditions of a batch would keep what one of them needs.
    parts = [None] if name != "edges_pruned" else [0, 1, 2]

    def errors(images: Tensor) -> float:
        some = [images if i is None else images[i : i + 1] for i in parts]
        return sum(
            error(conditioned(model, name, part), subject, i)
            for i, part in zip(parts, some, strict=True)
        )

    right, other = errors(images), errors(images.roll(1, 0))
    # Of one picture at a time there are as many errors as pictures.
    assert right < 0.9 * other and right < 0.9 * len(parts) * without[subject]
    assert not [r.message for r in caplog.records if "was trained" in r.message]


@torch.inference_mode()
def test_edges_steer_more_the_higher_the_scale(
    model: tuple[Any, Any, Any], truths: list[Any], error: Callable[..., float]
) -> None:
    images = conditions.condition_images("edges", truths, runs.SIDE)
    condition = nodes.ConditionEncode.execute(images, model[2], "aligned", 0, 0, 1.0)[0]
    errors = [
        error(
            nodes.ApplyLora.execute(
                model[0], condition, "omini2_demo_edges.safetensors", 1.0, scale, "auto", 0.0, 1.0
            )[0],
            False,
        )
        for scale in (0.0, 0.25, 0.5, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)


def test_every_run_left_its_file_and_its_record() -> None:
    shipped = {runs.trained(name) for name in runs.RUNS if name not in runs.STEPPING_STONES}
    assert shipped == set(LORAS.glob("*.safetensors"))
    assert all(Path(demo_model.FOLDER / "training" / f"{name}.csv").is_file() for name in runs.RUNS)

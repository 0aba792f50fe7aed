"""What trains on references against stock ComfyUI: ReferenceLatent, Load LoRA, Condition Cache."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import nodes as stock
import pytest
import torch
from comfy.latent_formats import Flux as FluxLatents
from helpers.editing import cached
from helpers.training import BASE, KnownEncoders, config, write_base, write_pictures
from safetensors import safe_open
from tiny import (
    Case,
    apply,
    flux_config,
    make_model,
    random_condition,
    record,
    relative_error,
    save_lora,
)
from torch import Tensor

from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.host import reference_files
from omini2_extension.omini2_core.tokens.condition import pack, unpack

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from omini2_extension.omini2_core.training.base import from_tensors, original_name
from omini2_extension.omini2_core.training.batches import Batch, Drawer, collate
from omini2_extension.omini2_core.training.branch import ConditionedFlux
from omini2_extension.omini2_core.training.config import TrainConfig, parse_config
from omini2_extension.omini2_core.training.encode import encode_data
from omini2_extension.omini2_core.training.loop import train
from omini2_extension.omini2_core.training.lora_file import (
    adapters,
    add_loras,
    lora_layers,
    lora_tensors,
    main_adapter,
    metadata,
)

TOLERANCE = 1e-5
SIZES = {"first": (64, 48), "second": (32, 64), "third": (48, 48)}  # pixels, width and height
SIGMA = 0.7


@pytest.fixture(autouse=True)
def _grad() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def edit_config(folder: Path, references: str, names: list[str], **changes: object) -> TrainConfig:
    for name in names:
        write_pictures(folder / name)
    conditions = [
        {"type": "folder", "folder": str(folder / n), "condition_size": [list(SIZES[n])]}
        for n in names
    ]
    return config(
        folder, references=references, conditions=conditions, drop_image_prob=0.0, **changes
    )


def drawn(settings: TrainConfig, numbers: range = range(2)) -> Batch:
    """A batch with other latents in each reference, so that none can stand for another."""
    encoders = KnownEncoders()
    data = encode_data(settings, lambda: encoders, encoders.fingerprint, torch.float32)
    drawer = Drawer(settings, data)
    generator = torch.Generator().manual_seed(4)
    examples = [drawer.example(number) for number in numbers]
    for example in examples:
        for tokens in (example.clean, *example.conditions):
            tokens.copy_(torch.randn(tokens.shape, generator=generator))
    return collate(examples, settings, torch.device("cpu"))


def models(settings: TrainConfig):
    """The trainer's model with a random LoRA, and the host's with the file of it."""
    host = make_model(flux_config(True, **BASE))
    weights = {
        original_name(k): w.clone() for k, w in host.model.diffusion_model.state_dict().items()
    }
    flux = from_tensors(weights, torch.float32, BASE["axes_dim"])
    add_loras(flux, settings)
    generator = torch.Generator().manual_seed(1)
    [name] = adapters(settings)
    for _, a, b in lora_layers(flux, name):
        for layer in (a, b):
            layer.weight.copy_(0.2 * torch.randn(layer.weight.shape, generator=generator))
    tensors = lora_tensors(flux, name)
    about = metadata(settings, 0, {})
    file = save_lora(f"edit-{settings.references}.safetensors", tensors, about)
    loaded, _ = stock.LoraLoader().load_lora(host, None, file, 1.0, 1.0)
    return ConditionedFlux(flux, main_adapter=main_adapter(settings)).eval(), host, loaded, file


def velocity(model: ConditionedFlux, batch: Batch, guidance: float = 3.5) -> Tensor:
    time = torch.full_like(batch.time, SIGMA)
    noisy = (1 - SIGMA) * batch.clean + SIGMA * batch.noise
    return model(
        noisy, batch.text, batch.pooled, time, batch.ids, batch.conditions,
        torch.full_like(time, guidance), batch.kept, batch.text_kept,
    )  # fmt: skip


def in_the_host(model, batch: Batch, settings: TrainConfig, row: int) -> Tensor:
    """The same of one sample through the stock sampling path."""
    width, height = settings.target_size
    hw = height // 16, width // 16
    latents = [
        FluxLatents().process_out(unpack(c.tokens[row : row + 1], (h // 16, w // 16)))
        for c, (w, h) in zip(
            batch.conditions, (SIZES[c.label] for c in settings.conditions), strict=True
        )
    ]
    clean, noise = (unpack(t[row : row + 1], hw) for t in (batch.clean, batch.noise))
    text = batch.text[row : row + 1]
    if batch.text_kept is not None:
        text = text[:, batch.text_kept[row]]
    # Recorder shows the model latent + noise.
    case = Case(
        {"steps": [SIGMA], "guidance": 3.5},
        {
            "latent": (1 - SIGMA) * clean,
            "noise": (SIGMA * noise)[None],
            "txt": text,
            "pooled": batch.pooled[row : row + 1],
        },
    )
    [[_, options]] = case.conditioning()
    prompt = [[text, {**options, "reference_latents": latents}]]
    with mock.patch.object(case, "conditioning", lambda: prompt):
        return pack(record(model, case)[0])


@pytest.mark.parametrize("references", ["joint", "isolated"])
@pytest.mark.parametrize("names", [["first"], ["first", "second", "third"]])
def test_the_velocity_is_stock_comfyuis(tmp_path: Path, references: str, names: list[str]) -> None:
    settings = edit_config(tmp_path, references, names)
    batch = drawn(settings)
    trainer, plain, loaded, _ = models(settings)
    kept = cached(loaded, "once", references=references)
    got = velocity(trainer, batch)
    for row in range(2):
        want = in_the_host(kept, batch, settings, row)
        assert relative_error(got[row : row + 1], want) < TOLERANCE
        without = in_the_host(cached(plain, "once", references=references), batch, settings, row)
        assert relative_error(without, want) > 100 * TOLERANCE
    other = "joint" if references == "isolated" else "isolated"
    wrong = in_the_host(cached(loaded, "once", references=other), batch, settings, 0)
    assert relative_error(wrong, got[:1]) > 100 * TOLERANCE


def test_auto_finds_out_how_a_file_was_trained(tmp_path: Path) -> None:
    import folder_paths

    for references in ("joint", "isolated"):
        settings = edit_config(tmp_path / references, references, ["first"])
        model, _, _, file = models(settings)
        path = Path(folder_paths.get_full_path("loras", file))
        assert reference_files.says_isolated(model, [path]) == (references == "isolated")


def test_the_file_is_none_for_a_condition(tmp_path: Path) -> None:
    _, host, _, file = models(edit_config(tmp_path, "isolated", ["first"]))
    with pytest.raises(Omini2Error, match="load it with Load LoRA"):
        apply(host, random_condition(4, 4), file)


def test_a_run_learns_and_goes_on(tmp_path: Path) -> None:
    """The pictures are their own references, so an edit is a copy."""
    options = {
        "references": "isolated",
        "conditions": [{"type": "resize", "name": "copy"}],
        "steps": 60,
        "rank": 8,
        "batch_size": 4,
        "optimizer": {"type": "adamw", "lr": 1e-2},
        "max_grad_norm": 1.0,
    }
    result = train(config(tmp_path, **options), KnownEncoders())
    assert sum(result.losses[-20:]) < 0.6 * sum(result.losses[:20])
    more = train(config(tmp_path, **{**options, "steps": 62}), KnownEncoders())
    assert more.steps == 62 and more.losses[:60] == pytest.approx(result.losses)
    [path] = more.loras
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["omini2.references"] == "isolated" and "omini2.family" not in about


@pytest.mark.parametrize("references", ["joint", "isolated"])
def test_a_sample_without_its_reference_in_a_batch(tmp_path: Path, references: str) -> None:
    """A dropped reference is one that the prompt doesn't have."""
    settings = edit_config(tmp_path, references, ["first"])
    batch = drawn(settings)
    trainer, *_ = models(settings)
    [tokens] = batch.conditions
    kept = torch.ones(2, tokens.tokens.shape[1], dtype=torch.bool)
    kept[1] = False
    half = Batch(**{**vars(batch), "conditions": [type(tokens)(**{**vars(tokens), "kept": kept})]})
    none = Batch(**{**vars(batch), "conditions": []})
    got = velocity(trainer, half)
    assert relative_error(got[:1], velocity(trainer, batch)[:1]) < TOLERANCE
    assert relative_error(got[1:], velocity(trainer, none)[1:]) < TOLERANCE
    dropped = settings.model_copy(update={"drop_image_prob": 1.0})
    encoders = KnownEncoders()
    data = encode_data(dropped, lambda: encoders, encoders.fingerprint, torch.float32)
    assert [len(c) for c in Drawer(dropped, data).example(0).conditions] == [0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"position_delta": [0, 4]}, "position_delta"),
        ({"independent_condition": True}, "independent_condition"),
        ({"main_lora": True}, "main_lora"),
        ({"pruning": True}, "pruning"),
    ],
)
def test_what_is_for_conditions_only_is_refused(tmp_path: Path, change: dict, said: str) -> None:
    base = write_base(tmp_path / "base.safetensors")
    pictures = write_pictures(tmp_path / "pictures")
    with pytest.raises(Omini2Error, match=f"{said} is for conditions"):
        parse_config(
            {
                "base": str(base),
                "output": str(tmp_path),
                "data": {"folder": str(pictures)},
                "references": "joint",
                "conditions": [{"type": "folder", "folder": str(pictures), **change}],
            }
        )


def test_an_edit_changes_all_layers(tmp_path: Path) -> None:
    with pytest.raises(Omini2Error, match="small is for conditions"):
        edit_config(tmp_path, "joint", ["first"], target_modules="small")

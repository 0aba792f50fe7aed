"""Every kind of FLUX.1 file, through the host's own loaders and its detection of models.

A picture with conditions equals that of the same numbers put into a model directly.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import gguf
import pytest
import torch
from comfy.latent_formats import Flux as FluxLatents
from comfy.model_patcher import ModelPatcher
from helpers.model_files import (
    E4M3,
    E5M2,
    HIDDEN,
    Stored,
    cast,
    load_checkpoint,
    load_diffusion_model,
    model_folder,
    model_of,
    save_gguf,
    scaled_fp8_header,
    scaled_fp8_layers,
    scaled_fp8_marker,
    tiny_heads,
    weights,
)
from tiny import (
    Recorder,
    apply,
    compact,
    flux_config,
    make_model,
    pixel_mask,
    prompt,
    random_condition,
    random_lora,
    relative_error,
    sample,
    with_cache,
)
from torch import Tensor

from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.host import identity

# The host computes in float32 on a CPU, whatever a file holds; so what is left is the order of
# the operations.
TOLERANCE = 1e-5


def row(name: str, note: str = "") -> pytest.MarkDecorator:
    return pytest.mark.compatibility("Models", name, "works", note)


@pytest.fixture(scope="module")
def lora() -> str:
    return random_lora("models.safetensors", HIDDEN)


@pytest.fixture(autouse=True)
def _nothing_left_over() -> Iterator[None]:
    yield
    comfy.model_management.unload_all_models()


def conditioned(model: ModelPatcher, lora: str) -> ModelPatcher:
    """A joint condition and an independent one, both reused."""
    model = apply(model, random_condition(4, 4, placement="fit"), lora, attention="joint")
    model = apply(model, random_condition(3, 3, seed=1), lora, attention="independent")
    return with_cache(model, "auto", 2)


def same_picture(model: ModelPatcher, reference: ModelPatcher, lora: str) -> None:
    want = sample(conditioned(reference, lora), steps=3)
    assert relative_error(sample(reference, steps=3), want) > 1e-2, "no condition to speak of"
    assert relative_error(sample(conditioned(model, lora), steps=3), want) < TOLERANCE


@pytest.mark.parametrize(
    ("guidance_embed", "loader"),
    [
        pytest.param(
            True,
            load_diffusion_model,
            marks=[
                row("FLUX.1 dev"),
                row("FLUX.1 Krea dev", "Its file has the shape of dev's."),
                row("Files of Load Diffusion Model"),
            ],
        ),
        pytest.param(False, load_diffusion_model, marks=row("FLUX.1 schnell")),
        pytest.param(True, load_checkpoint, marks=row("Files of Load Checkpoint")),
        pytest.param(False, load_checkpoint),
    ],
    ids=["dev", "schnell", "dev checkpoint", "schnell checkpoint"],
)
def test_models(guidance_embed: bool, loader: Any, lora: str, tmp_path: Path) -> None:
    stored = cast(torch.float32)(weights(guidance_embed))
    model = loader(tmp_path / "model.safetensors", stored)
    assert model.model.diffusion_model.params.guidance_embed == guidance_embed
    same_picture(model, model_of(stored.numbers, guidance_embed), lora)


# --- number formats ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "store",
    [
        pytest.param(cast(torch.float32), id="fp32", marks=row("fp32")),
        pytest.param(cast(torch.bfloat16), id="bf16", marks=row("bf16")),
        pytest.param(cast(torch.float16), id="fp16", marks=row("fp16")),
        pytest.param(cast(E4M3), id="fp8_e4m3fn", marks=row("fp8 e4m3")),
        pytest.param(cast(E5M2), id="fp8_e5m2", marks=row("fp8 e5m2")),
        pytest.param(
            scaled_fp8_marker, id="scaled_marker", marks=row("Scaled fp8, marked by scaled_fp8")
        ),
        pytest.param(
            scaled_fp8_header, id="scaled_header", marks=row("Scaled fp8, layers in the header")
        ),
        pytest.param(
            scaled_fp8_layers,
            id="scaled_layers",
            marks=[
                row("Scaled fp8, comfy_quant in each layer", "Hosts that read such files."),
                pytest.mark.skipif(
                    not hasattr(comfy.utils, "convert_old_quants"),
                    reason="this host reads no such files",
                ),
            ],
        ),
    ],
)
def test_formats_of_files(store: Any, lora: str, tmp_path: Path) -> None:
    stored: Stored = store(weights())
    model = load_diffusion_model(tmp_path / "model.safetensors", stored)
    name = identity.fit_of(model)
    same_picture(model, model_of(stored.numbers), lora)
    assert identity.fit_of(load_diffusion_model(tmp_path / "again.safetensors", stored)) == name
    other: Stored = store(weights(seed=1))
    assert identity.fit_of(load_diffusion_model(tmp_path / "other.safetensors", other)) != name


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "fp8_e5m2"])
def test_weight_dtype_of_the_loader(name: str, lora: str, tmp_path: Path) -> None:
    given = weights()
    model = load_diffusion_model(tmp_path / "model.safetensors", cast(torch.bfloat16)(given), name)
    dtype = getattr(torch, "float8_" + name.removeprefix("fp8_"))
    assert model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight.dtype == dtype
    rounded = cast(torch.bfloat16)(given).numbers
    same_picture(model, model_of(cast(dtype)(rounded).numbers), lora)


@pytest.mark.parametrize("store", [scaled_fp8_marker, scaled_fp8_header], ids=["marker", "header"])
def test_scaled_fp8_computed_in_bf16(
    store: Any, lora: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: conditions cost no more accuracy than the model alone loses to it."""
    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda *args, **kwargs: True)
    stored: Stored = store(weights())
    model = load_diffusion_model(tmp_path / "model.safetensors", stored)
    assert identity.fit_of(model).dtype == "torch.bfloat16"
    reference = model_of(stored.numbers)
    positive = prompt(0, guidance=4.0)  # the host rounds 3.5 * 1000 to bf16, which moves pictures
    lost = relative_error(sample(model, positive=positive), sample(reference, positive=positive))
    want = sample(conditioned(reference, lora), positive=positive)
    got = sample(conditioned(model, lora), positive=positive)
    assert 0 < relative_error(got, want) < 2 * lost < 0.2


# --- GGUF --------------------------------------------------------------------------------------


KINDS = ("Q8_0", "Q4_0", "Q4_K")
GGUF_FOLDER = os.path.expanduser(os.environ.get("COMFYUI_GGUF_PATH", ""))


def gguf_note() -> str:
    """Which ComfyUI-GGUF it is, as its checkout says."""
    if not GGUF_FOLDER:
        return ""
    command = ["git", "-C", GGUF_FOLDER, "log", "-1", "--format=%h of %as"]
    found = subprocess.run(command, capture_output=True, text=True)
    return f"With ComfyUI-GGUF {found.stdout.strip()}." if found.returncode == 0 else ""


@pytest.fixture(scope="module")
def gguf_nodes() -> ModuleType:
    """city96's ComfyUI-GGUF, which is in no package index, as the host loads it."""
    if not GGUF_FOLDER:
        pytest.skip("COMFYUI_GGUF_PATH names no checkout of ComfyUI-GGUF")
    name = "comfyui_gguf"
    spec = importlib.util.spec_from_file_location(name, Path(GGUF_FOLDER) / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_gguf(nodes: ModuleType, path: Path, dequant_dtype: str = "default") -> ModelPatcher:
    """*Unet Loader (GGUF/Advanced)*; with "default" it does what *Unet Loader (GGUF)* does."""
    loader = nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUFAdvanced"]()
    with model_folder("diffusion_models", path.parent), tiny_heads():
        return loader.load_unet(path.name, dequant_dtype, "default", False)[0]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=row(f"GGUF {kind}", gguf_note())) for kind in KINDS],
)
def test_gguf(kind: str, lora: str, gguf_nodes: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    numbers = save_gguf(path, weights(), gguf.GGMLQuantizationType[kind])
    reference = model_of(numbers)
    same_picture(load_gguf(gguf_nodes, path, "float32"), reference, lora)
    # By default weights are computed in float16, which conditions suffer from no more than others.
    model = load_gguf(gguf_nodes, path)
    lost = relative_error(sample(model), sample(reference))
    want = sample(conditioned(reference, lora))
    assert 0 < relative_error(sample(conditioned(model, lora)), want) < 2 * lost < 1e-2


def test_a_gguf_model_has_a_name_for_saved_caches(gguf_nodes: ModuleType, tmp_path: Path) -> None:
    names = []
    for i, seed in enumerate((0, 0, 1)):
        path = tmp_path / f"{i}.gguf"
        save_gguf(path, weights(seed=seed), gguf.GGMLQuantizationType.Q8_0)
        model = load_gguf(gguf_nodes, path)
        before = identity.fit_of(model)
        sample(model, steps=1)
        assert identity.fit_of(model) == before
        names.append(before)
    assert names[0] == names[1] != names[2]


# --- what a file's name says -------------------------------------------------------------------


def test_a_name_decides_nothing(lora: str, tmp_path: Path) -> None:
    fill = cast(torch.float32)(weights(in_channels=96))
    model = load_diffusion_model(tmp_path / "flux1-dev.safetensors", fill)
    with pytest.raises(Omini2Error, match="takes extra picture channels"):
        apply(model, random_condition(), lora)
    dev = cast(torch.float32)(weights())
    model = load_diffusion_model(tmp_path / "flux1-fill-dev.safetensors", dev)
    sample(apply(model, random_condition(), lora), steps=1)


# --- Kontext -----------------------------------------------------------------------------------

SIGMAS = (0.9, 0.4)


def velocities(model: ModelPatcher, latent: Tensor, noise: Tensor, positive: list[Any]) -> Tensor:
    recorder = Recorder(latent, noise)
    comfy.sample.sample_custom(
        model, torch.zeros_like(latent), 1.0, comfy.samplers.KSAMPLER(recorder),
        torch.tensor([*SIGMAS, 0.0]), positive, positive, latent, disable_pbar=True,
    )  # fmt: skip
    return torch.stack(recorder.velocities)


@row("FLUX.1 Kontext, reference latents")
@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_reference_latents_beside_conditions(attention: str) -> None:
    """As one wide picture of which all but the left is given, at the references' positions."""
    dev = make_model(flux_config(True))
    condition, lora = random_condition(4, 4), random_lora("kontext.safetensors")
    model = with_cache(apply(dev, condition, lora, attention=attention), "auto", 1)
    latent, first, second = torch.randn(3, 1, 16, 12, 12)
    noise = torch.randn(len(SIGMAS), 1, 16, 12, 12)

    references = [FluxLatents().process_out(each) for each in (first, second)]
    got = velocities(model, latent, noise, prompt(0, reference_latents=references))

    def positions(args: dict[str, Any]) -> dict[str, Any]:
        """The host puts references into layer 1, the second below the first."""
        time, rows, columns = args["img_ids"].clone().unbind(-1)
        part = columns // 6
        ids = torch.stack((time + (part > 0), rows + 6 * (part == 2), columns - 6 * part), -1)
        return {**args, "img_ids": ids}

    wide = model.clone()
    wide.set_model_patch(positions, "post_input")
    whole = torch.cat((latent, first, second), -1)
    widely = torch.nn.functional.pad(noise, (0, 24))
    want = velocities(wide, whole, widely, prompt(0))[..., :12]
    assert relative_error(got, want) < 1e-5
    alone = velocities(dev, latent, noise, prompt(0, reference_latents=references))
    without = velocities(model, latent, noise, prompt(0))
    assert relative_error(alone, want) > 1e-3 and relative_error(without, want) > 1e-3


@row("FLUX.1 Kontext, reference latents and token integration")
def test_reference_latents_beside_token_integration() -> None:
    """The references stay whole when the picture's known tokens are taken out."""
    dev = make_model(flux_config(True))
    paint = torch.zeros(6, 6, dtype=torch.bool)
    paint[2:4, 1:5] = True
    condition = compact(random_condition(), token_integration=True, mask=pixel_mask(paint))[0]
    model = apply(dev, condition, random_lora("kontext.safetensors"))
    rows = []
    model.set_model_patch(lambda args: rows.append(args["img"].shape[1]) or args, "post_input")
    reference = torch.randn(1, 16, 8, 12)
    got = sample(model, positive=prompt(0, reference_latents=[reference]))
    assert set(rows) <= {36 + 24, int(paint.sum()) + 24}
    plain = sample(model)
    known = ~paint.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(got[..., known], plain[..., known])
    assert relative_error(got[..., ~known], plain[..., ~known]) > 1e-3

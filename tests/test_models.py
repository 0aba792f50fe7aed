"""Every kind of FLUX.1 file, through the host's own loaders and its detection of models.

A picture with conditions equals that of the same numbers put into a model directly.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.utils
import gguf
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from model_files import (
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
from tiny import apply, prompt, random_condition, random_lora, relative_error, sample, with_cache

from omini2_extension.omini2_core import host_saved

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
    name = host_saved.fit_of(model)
    same_picture(model, model_of(stored.numbers), lora)
    assert host_saved.fit_of(load_diffusion_model(tmp_path / "again.safetensors", stored)) == name
    other: Stored = store(weights(seed=1))
    assert host_saved.fit_of(load_diffusion_model(tmp_path / "other.safetensors", other)) != name


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
    assert host_saved.fit_of(model).dtype == "torch.bfloat16"
    reference = model_of(stored.numbers)
    positive = prompt(0, guidance=4.0)  # the host rounds 3.5 * 1000 to bf16, which moves pictures
    lost = relative_error(sample(model, positive=positive), sample(reference, positive=positive))
    want = sample(conditioned(reference, lora), positive=positive)
    got = sample(conditioned(model, lora), positive=positive)
    assert 0 < relative_error(got, want) < 2 * lost < 0.2


# --- GGUF --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_nodes() -> ModuleType:
    """city96's ComfyUI-GGUF, which is in no package index, as the host loads it."""
    folder = os.environ.get("COMFYUI_GGUF_PATH")
    if not folder:
        pytest.skip("COMFYUI_GGUF_PATH names no checkout of ComfyUI-GGUF")
    name = "comfyui_gguf"
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "__init__.py")
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
    [
        pytest.param("Q8_0", marks=row("GGUF Q8_0")),
        pytest.param("Q4_0", marks=row("GGUF Q4_0")),
        pytest.param("Q4_K", marks=row("GGUF Q4_K")),
    ],
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
        before = host_saved.fit_of(model)
        sample(model, steps=1)
        assert host_saved.fit_of(model) == before
        names.append(before)
    assert names[0] == names[1] != names[2]

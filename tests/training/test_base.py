"""What the trainer takes as a base, in how many bits, and its progress bar."""

import sys

import pytest
import torch

pytest.importorskip("diffusers")
from helpers.training import BASE, write_base
from safetensors.torch import load_file, save_file

from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.training.base import load_base, original_name, quantized
from omini2_extension.omini2_core.training.progress import Bar, Progress

AXES = BASE["axes_dim"]


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base.safetensors")


def load(path):
    return load_base(str(path), torch.float32, AXES)


def test_a_diffusers_folder_is_the_same_model(base, tmp_path) -> None:
    """With or without the pipeline's folder around it."""
    single = load(base)
    single.save_pretrained(tmp_path / "pipeline" / "transformer")
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "transformer"):
        model = load(folder)
        assert not any(weight.requires_grad for weight in model.parameters())
        state = model.state_dict()
        for key, weight in single.state_dict().items():
            assert torch.equal(state[key], weight)


def test_fp8_with_scales_is_what_it_stands_for(base, tmp_path) -> None:
    weights = load_file(base)
    want = load(base).transformer_blocks[0].ff.net[2].weight
    key = "double_blocks.0.img_mlp.2"
    weights[f"{key}.weight"] = weights[f"{key}.weight"] / 4
    weights[f"{key}.scale_weight"] = torch.tensor(4.0)
    weights[f"{key}.scale_input"] = torch.tensor(9.0)
    weights["scaled_fp8"] = torch.zeros(0)
    save_file(weights, tmp_path / "scaled.safetensors")
    got = load(tmp_path / "scaled.safetensors").transformer_blocks[0].ff.net[2].weight
    assert torch.allclose(got, want)


def test_names_of_newer_comfyuis_are_the_same_model(base, tmp_path) -> None:
    path = tmp_path / "newer.safetensors"
    names = {
        old: original_name(old).replace("_norm.scale", "_norm.weight") for old in load_file(base)
    }
    assert any(name.endswith("key_norm.weight") for name in names.values())
    save_file({names[key]: tensor for key, tensor in load_file(base).items()}, path)
    want, got = load(base).state_dict(), load(path).state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("base.gguf", None, "is neither a folder nor a .safetensors file"),
        ("base.sft", None, "can't be read as a safetensors file"),
        ("folder", None, "holds no FLUX.1 transformer in diffusers' layout"),
        ("a.safetensors", "vector_in.in_layer.weight", "is no FLUX.1 transformer"),
        ("b.safetensors", "txt_in.bias", r"lacks 1 of FLUX.1's tensors \(context_embedder.bias"),
    ],
)
def test_a_base_that_is_none(base, tmp_path, name, change, said) -> None:
    path = tmp_path / name
    if change:
        weights = load_file(base)
        del weights[change]
        save_file(weights, path)
    elif name == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"noise")
    with pytest.raises(Omini2Error, match=f"^base: .*{said}"):
        load(path)


@pytest.mark.parametrize(("kind", "library"), [("nf4", "bitsandbytes"), ("int8", "torchao")])
def test_fewer_bits_need_a_library(base, monkeypatch, kind, library) -> None:
    model = load(base)
    monkeypatch.setitem(sys.modules, library, None)
    assert quantized(model, "none") is model
    with pytest.raises(Omini2Error, match=f"^quantize: {kind} needs {library}.*pip install"):
        quantized(model, kind)


def test_the_bar_shows_each_stage(capsys) -> None:
    with Bar() as bar:
        bar.show(Progress("encode", 1, 0))
        bar.show(Progress("encode", 7, 0))
        bar.show(Progress("train", 4, 9, smoothed=0.12345, memory_bytes=2_500_000_000))
        bar.show(Progress("train", 9, 9, smoothed=0.5, memory_bytes=0))
    shown = capsys.readouterr().err
    assert "encode: 7picture" in shown
    assert "9/9" in shown and "loss 0.5000, 0.0 GB" in shown
    with Bar():
        pass  # nothing was shown, nothing is left open

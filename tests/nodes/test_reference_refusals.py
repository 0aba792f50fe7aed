"""Omini2 Reference refuses what it cannot do, in a sentence naming the input and the way out."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.editing import MODELS, has, of_class, sample
from helpers.reference import TinyVae, image, refer, token_mask
from helpers.refusals import refused, sentence
from tiny import flux_config, make_model

from omini2_extension.nodes import Reference
from omini2_extension.omini2_core.host.references import KEEP_THEIR_OWN

KONTEXT, QWEN = MODELS["Kontext"], MODELS["Qwen"]
DEFAULTS = {
    "compression": 1.0, "position_correcting": True, "strength": 1.0, "start_percent": 0.0,
    "end_percent": 1.0,
}  # fmt: skip


class Vae:
    """Gives what it was told to."""

    def __init__(self, *shape: int, value: float = 0.0) -> None:
        self.latent = torch.full(shape, value)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.latent


def given(**changes: Any) -> dict[str, Any]:
    values = {
        "model": KONTEXT.make(), "positive": KONTEXT.prompt(0), "vae": TinyVae(KONTEXT),
        "image": image(4, 5), **DEFAULTS,
    }  # fmt: skip
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"model": "flux"}, "model: this is no model but str; connect Load Diffusion Model"),
        ({"positive": "a cat"}, "positive: this is no prompt but str"),
        ({"positive": [1]}, "positive: this is no prompt but list"),
        ({"positive": None}, "positive: this is no prompt but NoneType"),
        ({"negative": {"text": 1}}, "negative: this is no prompt but dict"),
        ({"vae": "ae.safetensors"}, "vae: this is no VAE but str; connect Load VAE"),
        ({"image": "cat.png"}, "image: this is no image but str"),
        ({"image": image(4, 5) * float("nan")}, "image: it holds NaN"),
        ({"image": torch.rand(1, 8, 64, 3)}, "image: 64x8 pixels is smaller than one token"),
        ({"mask": "all"}, "mask: this is no mask but str"),
        ({"mask": torch.zeros(1, 64, 80)}, "mask: it keeps no token of the reference"),
        ({"compression": 0.05}, "compression: 0.05 leaves no token of 5x4; use at least 0.125"),
        ({"compression": 2.0}, "compression: 2 is out of bounds"),
        ({"strength": -1.0}, "strength: -1 is out of bounds"),
        ({"strength": float("nan")}, "strength: nan is out of bounds"),
        ({"start_percent": 1.5}, "start_percent: 1.5 is out of bounds"),
        (
            {"start_percent": 0.5, "end_percent": 0.5},
            "start_percent: 0.5 is not below end_percent .* lower start_percent",
        ),
        ({"fit": "stretch"}, "fit: stretch is not on offer"),
        ({"fit": "picture"}, "fit: picture needs the picture's size; connect latent"),
        ({"fit": "picture", "latent": 5}, "latent: this is no latent but int"),
        ({"fit": "picture", "latent": {}}, "latent: this is no latent but dict"),
        ({"vae": Vae(1, 4, 8, 10)}, "vae: it gives latents of shape .*belongs to FLUX.1 Kontext"),
        ({"vae": Vae(1, 16, 1, 8, 10)}, "vae: it gives latents of shape"),
        ({"vae": Vae(1, 16, 8, 10), "compression": 0.5}, r"vae: .* instead of \(16, 4, 6\)"),
        ({"vae": Vae(1, 16, 8, 10, value=float("inf"))}, "vae: it gives NaN or infinite values"),
        ({"shade": 5}, "shade: this node has no such input"),
    ],
)
def test_wrong_inputs(changes: dict[str, Any], pattern: str) -> None:
    with refused(pattern) as error:
        Reference.execute(**given(**changes))
    sentence(error)


@pytest.mark.parametrize("name", [*KEEP_THEIR_OWN, "Omnigen2", "Lumina2", "WAN21"])
def test_models_without_references_of_this_kind(name: str) -> None:
    with refused(rf"model: (this is )?{name}") as error:
        Reference.execute(**given(model=of_class(name)))
    sentence(error)


def test_flux1_that_takes_other_pictures() -> None:
    fill = make_model(flux_config(True, in_channels=96))
    with refused("model: this FLUX.1 takes extra picture channels") as error:
        Reference.execute(**given(model=fill))
    sentence(error)


class KV_Attn_Input:
    """What the host's Flux KV Cache puts onto a model."""

    def __call__(self, q: Any, k: Any, v: Any, **_: Any) -> dict[str, Any]:
        return {}


def test_flux_kv_cache_on_the_same_model() -> None:
    model = KONTEXT.make()
    model.set_model_attn1_patch(KV_Attn_Input())
    Reference.execute(**given(model=model))
    with refused(
        "model: Flux KV Cache .* or leave this node's settings at their defaults"
    ) as error:
        Reference.execute(**given(model=model, strength=0.5))
    sentence(error)
    later, positive, _ = refer(KONTEXT.make(), KONTEXT, KONTEXT.prompt(0), image(4, 5), strength=2)
    later.set_model_attn1_patch(KV_Attn_Input())
    with refused("model: Flux KV Cache .* or use Reference Latent") as error:
        sample(later, KONTEXT, positive)
    sentence(error)


# --- Qwen-Image on a host that has no way to move its rows ---------------------------------------


@pytest.mark.skipif(has("Krea2"), reason="this host has the hook")
@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"compression": 0.5}, "position_correcting: .*Qwen-Image-Edit.* or switch it off"),
        ({"mask": token_mask([[1, 0]] * 4)}, "mask: .*Qwen-Image-Edit.* or disconnect it"),
    ],
)
def test_a_host_that_cannot_move_qwen_s_rows(changes: dict[str, Any], pattern: str) -> None:
    model = QWEN.make()
    pixels = image(4, 2)
    with refused(pattern) as error:
        refer(model, QWEN, QWEN.prompt(0), pixels, **changes)
    sentence(error)
    refer(model, QWEN, QWEN.prompt(0), pixels, compression=0.5, position_correcting=False)


@pytest.mark.skipif(has("Krea2"), reason="this host has the hook")
def test_a_host_that_cannot_leave_out_a_reference_that_others_follow() -> None:
    model, positive, _ = refer(QWEN.make(), QWEN, QWEN.prompt(0), image(4, 5), end_percent=0.5)
    sample(model, QWEN, positive)
    model, positive, _ = refer(model, QWEN, positive, image(4, 5))
    with refused("end_percent: this ComfyUI .*put that reference behind") as error:
        sample(model, QWEN, positive)
    sentence(error)


# --- what is said ---------------------------------------------------------------------------------


def node_of(graph: dict[str, Any]) -> type[Reference]:
    """The node as it runs as number 2 of a graph."""

    class Running(Reference):
        hidden = SimpleNamespace(prompt=graph, unique_id="2")

    return Running


@pytest.mark.parametrize(
    ("links", "settings", "said"),
    [
        ({"positive": ["2", 1]}, {"strength": 0.5}, True),
        ({"positive": ["2", 1], "model": ["2", 0]}, {"strength": 0.5}, False),
        ({"positive": ["2", 1]}, {}, False),
    ],
)
def test_a_model_output_that_leads_nowhere_is_said(
    links: dict[str, Any], settings: dict[str, Any], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    graph = {"2": {"inputs": {}}, "3": {"inputs": links}}
    with caplog.at_level(logging.WARNING):
        node_of(graph).execute(**given(**settings))
    assert ("nothing is connected to this output" in caplog.text) is said


def test_fit_takes_the_size_that_the_sampler_makes_of_a_latent() -> None:
    """Newer hosts scale an empty latent that was made for another VAE."""
    tiny = MODELS["FLUX.2 klein"]
    for latent, size in (
        ({"samples": torch.zeros(1, 128, 4, 6)}, (4, 6)),
        ({"samples": torch.ones(1, 128, 3, 5), "downscale_ratio_spacial": 8}, (3, 5)),
        (
            {"samples": torch.zeros(1, 16, 8, 12), "downscale_ratio_spacial": 8},
            (4, 6) if has("Krea2") else (8, 12),
        ),
    ):
        _, positive, _ = refer(
            tiny.make(), tiny, tiny.prompt(0), image(5, 5), fit="picture", latent=latent
        )
        (reference,) = positive[0][1]["reference_latents"]
        assert reference.shape[-2:] == size

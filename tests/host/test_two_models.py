"""A guider that runs two models: each prompt as its own model's run gives it, or refused."""

from itertools import pairwise

import comfy.latent_formats
import comfy.sample
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from helpers.refusals import refused
from tiny import apply, flux_config, make_model, prompt, random_condition, relative_error

pytestmark = [
    pytest.mark.skipif(
        not hasattr(custom, "DualModelGuider"), reason="this host has no Dual Model CFG Guider"
    ),
]
SIGMAS = torch.linspace(1, 0, 4)
NOISE = torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def negative_model(model):
    weights = model.model.diffusion_model.state_dict()
    generator = torch.Generator().manual_seed(7)
    return make_model(flux_config(True), {
        key: w + 0.1 * torch.randn(w.shape, generator=generator) * w.shape[-1] ** -0.5
        for key, w in weights.items()
    })  # fmt: skip


def both(positive, negative, cfg=3.0):
    node = custom.DualModelGuider.execute(
        model=positive, positive=prompt(0), cfg=cfg, model_negative=negative, negative=prompt(1)
    )
    euler = comfy.samplers.sampler_object("euler")
    zero = torch.zeros_like(NOISE)
    return node.args[0].sample(NOISE, zero, euler, SIGMAS, disable_pbar=True, seed=1)


def denoised(model, x, sigma, conditioning):
    """One evaluation in an ordinary run of one model."""
    found = []

    def sampler(net, x_in, sigmas, extra_args=None, **_):
        found.append(net(x, sigma.expand(1), **extra_args))
        return x_in

    comfy.sample.sample_custom(
        model, torch.zeros_like(x), 1.0, comfy.samplers.KSAMPLER(sampler),
        torch.stack([sigma, sigma * 0]), conditioning, conditioning, torch.zeros_like(x),
        disable_pbar=True,
    )  # fmt: skip
    return found[0]


def by_hand(positive, negative, cfg=3.0):
    x = NOISE.clone()
    for sigma, after in pairwise(SIGMAS):
        without = denoised(negative, x, sigma, prompt(1))
        guided = without + cfg * (denoised(positive, x, sigma, prompt(0)) - without)
        x = x + (x - guided) / sigma * (after - sigma)
    return comfy.latent_formats.Flux().process_out(x)


@pytest.mark.compatibility("Neighbours", "Dual Model CFG Guider, conditions on model", "works")
def test_conditions_of_the_positive_model(model, lora, attention, negative_model) -> None:
    assert relative_error(both(model, negative_model), by_hand(model, negative_model)) < 1e-4
    conditioned = apply(model, random_condition(), lora, attention=attention)
    want = by_hand(conditioned, negative_model)
    assert relative_error(both(conditioned, negative_model), want) < 1e-4


@pytest.mark.compatibility(
    "Neighbours", "Dual Model CFG Guider, conditions on model_negative", "refused"
)
def test_conditions_of_the_negative_model(model, lora, attention, negative_model) -> None:
    conditioned = apply(negative_model, random_condition(), lora, attention=attention)
    for positive in (model, apply(model, random_condition(), lora)):
        with refused("^model: conditions on a MODEL that a guider runs beside its own"):
            both(positive, conditioned)
    both(model, negative_model)  # and nothing is left behind


def test_one_model_under_two_names(model, lora) -> None:
    with refused("^model: this guider runs the same model under two names"):
        both(apply(model, random_condition(), lora), model)


def test_where_the_negative_is_left_out_it_may_be_anything(model, lora, negative_model) -> None:
    conditioned = apply(negative_model, random_condition(), lora)
    assert torch.isfinite(both(model, conditioned, cfg=1.0)).all()

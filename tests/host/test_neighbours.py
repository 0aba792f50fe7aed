"""ComfyUI's own nodes in one graph with conditions: LoRAs, hooks, ControlNets, second passes."""

import itertools

import comfy.controlnet
import comfy.model_detection
import comfy.sample
import comfy.samplers
import comfy.supported_models
import comfy_extras.nodes_custom_sampler as custom_sampler
import comfy_extras.nodes_flux as nodes_flux
import comfy_extras.nodes_hooks as nodes_hooks
import nodes as host_nodes
import pytest
import torch
from comfy.ldm.flux.controlnet import ControlNetFlux
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_model_advanced import ModelSamplingFlux
from comfy_extras.nodes_model_merging import ModelMergeSimple
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from tiny import (
    LatentVae,
    apply,
    flux_config,
    make_model,
    prompt,
    random_condition,
    recorded_runs,
    reference,
    relative_error,
    sample,
    save_lora,
    with_cache,
)

import omini2_extension.nodes as nodes
from omini2_extension.omini2_core.host import identity

row = pytest.mark.compatibility


@pytest.fixture(scope="module")
def style():
    return save_lora("style.safetensors", reference("dev_like").under("lora.style."))


def output(node):
    """The first output of a node of the host, old or new."""
    return node[0]


def other_model():
    weights = make_model(flux_config(True)).model.diffusion_model.state_dict()
    return make_model(flux_config(True), {key: value * 1.05 for key, value in weights.items()})


def lora_stack(model, style):
    loader = host_nodes.LoraLoaderModelOnly
    once = loader().load_lora_model_only(model, style, 0.8)[0]
    twice = loader().load_lora_model_only(once, style, -0.3)[0]
    return host_nodes.LoraLoader().load_lora(twice, None, style, 0.5, 0.0)[0]


MODEL_NODES = {
    "stack of ordinary LoRAs": lambda m, style: lora_stack(m, style),
    "ModelSamplingFlux": lambda m, style: ModelSamplingFlux().patch(m, 1.5, 0.3, 512, 768)[0],
    "SkipLayerGuidanceDiT": lambda m, style: output(
        SkipLayerGuidanceDiT.execute(
            m, 2.0, 0.0, 1.0, double_layers="1", single_layers="0, 2", rescaling_scale=0.2
        )
    ),
    "EasyCache": lambda m, style: output(EasyCacheNode.execute(m, 3.0, 0.15, 0.95, False)),
    "LazyCache": lambda m, style: output(LazyCacheNode.execute(m, 3.0, 0.15, 0.95, False)),
}


LIMITS = {
    "SkipLayerGuidanceDiT": (
        "works with a limit",
        "Without reuse a condition skips its blocks too, with reuse it doesn't; not with token "
        "integration and the last single block.",
    )
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=row("Neighbours", n, *LIMITS.get(n, ("works",))), id=n)
        for n in MODEL_NODES
    ],
)
def test_nodes_on_the_model(model, lora, style, attention, name) -> None:
    """Before or after ours, both take part, and reuse changes what it changes without them."""

    def neighbour(m):
        return MODEL_NODES[name](m, style)

    def conditioned(base, **options):
        return apply(base, random_condition(), lora, attention=attention, **options)

    steps = 8 if name in ("EasyCache", "LazyCache") else 3
    got = sample(neighbour(conditioned(model)), steps=steps)
    assert relative_error(sample(conditioned(neighbour(model)), steps=steps), got) < 1e-6
    plain = sample(neighbour(model), steps=steps)
    assert relative_error(got, plain) > 1e-3
    assert relative_error(got, sample(conditioned(model), steps=steps)) > 1e-5
    shut_out = neighbour(conditioned(model, condition_scale=0.0))
    assert torch.equal(sample(shut_out, steps=steps), plain)
    if name == "SkipLayerGuidanceDiT":
        return  # only without reuse do conditions skip its blocks too
    reuse = ("every_n_steps", 1) if attention == "joint" else ("once",)
    cached = with_cache(neighbour(conditioned(model)), *reuse)
    assert relative_error(sample(cached, steps=steps), got) < 1e-5


@row("Neighbours", "EasyCache and LazyCache with image guidance", "works")
@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_caches_of_the_host_with_image_guidance(model, lora, node) -> None:
    guided = nodes.ImageGuidance.execute(apply(model, random_condition(), lora), 1.5)[0]
    never = output(node.execute(guided, 0.0, 0.15, 0.95, False))
    assert torch.equal(sample(never), sample(guided))
    eager = output(node.execute(guided, 3.0, 0.15, 0.95, False))
    unguided = nodes.ImageGuidance.execute(guided, 1.0)[0]
    eager_unguided = output(node.execute(unguided, 3.0, 0.15, 0.95, False))
    got = sample(eager, steps=8)
    assert relative_error(got, sample(guided, steps=8)) > 1e-3
    assert relative_error(got, sample(eager_unguided, steps=8)) > 1e-3


@row("Neighbours", "merging models", "works", "Conditions of the first MODEL; the merge is theirs.")
def test_merged_models(model, lora) -> None:
    conditioned = apply(model, random_condition(), lora, attention="independent")
    merge = ModelMergeSimple()
    after = merge.merge(conditioned, other_model(), 0.3)[0]
    merged = merge.merge(model, other_model(), 0.3)[0]
    before = apply(merged, random_condition(), lora, attention="independent")
    got = sample(with_cache(after, "once"))
    assert torch.equal(got, sample(before))
    assert relative_error(got, sample(with_cache(conditioned, "once"))) > 1e-4
    assert relative_error(got, sample(merged)) > 1e-3


def hooked(style: str, strength: float, keyframes=None):
    """A prompt with a LoRA hook."""
    hooks = nodes_hooks.CreateHookLoraModelOnly().create_hook_model_only(style, strength)[0]
    if keyframes is not None:
        hooks = nodes_hooks.SetHookKeyframes().set_hook_keyframes(hooks, keyframes)[0]
    return nodes_hooks.SetModelHooksOnCond().attach_hook(prompt(0), hooks)[0]


@row(
    "Neighbours",
    "LoRA hooks on prompts",
    "works with a limit",
    "They change the conditions too, which is said; computed once, a condition keeps a scheduled "
    "hook's first strength.",
)
def test_lora_hooks(lora, style, attention, caplog) -> None:
    model = reference("dev_like").model()
    conditioned = apply(model, random_condition(), lora, attention=attention)
    got = sample(conditioned, positive=hooked(style, 1.0), cfg=2.0)
    assert "a LoRA of type hook changes the conditions too" in caplog.text
    assert relative_error(got, sample(conditioned, cfg=2.0)) > 1e-4
    assert relative_error(got, sample(model, positive=hooked(style, 1.0), cfg=2.0)) > 1e-4
    reuse = ("every_n_steps", 1) if attention == "joint" else ("once",)
    cached = with_cache(conditioned, *reuse)
    # Run after run: nothing is left of the hook that was there before.
    for strength, want in ((0.2, None), (1.0, got), (0.0, sample(conditioned, cfg=2.0))):
        again = sample(cached, positive=hooked(style, strength), cfg=2.0)
        assert want is None or relative_error(again, want) < 1e-5


class ControlVae(LatentVae):
    """As the ControlNet of latents asks for it."""

    def spacial_compression_encode(self) -> int:
        return 8


def xlabs_file() -> dict[str, torch.Tensor]:
    """A ControlNet as XLabs publishes them: the names of the original FLUX code."""
    config = flux_config(True, depth=2, depth_single_blocks=0)
    config.pop("image_model")
    net = ControlNetFlux(operations=comfy.ops.disable_weight_init, dtype=torch.float32, **config)
    return {
        key.replace("_norm.weight", "_norm.scale"): value for key, value in net.state_dict().items()
    }


def instantx_file() -> dict[str, torch.Tensor]:
    """A ControlNet as InstantX publishes them: the names of diffusers."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FluxControlNetModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=16,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ).state_dict()  # fmt: skip


@pytest.mark.parametrize(
    ("make", "singles"),
    [
        pytest.param(
            xlabs_file, 0, marks=row("Neighbours", "ControlNet, XLabs' files", "works"), id="xlabs"
        ),
        pytest.param(
            instantx_file,
            1,
            marks=row("Neighbours", "ControlNet, InstantX' files", "works"),
            id="instantx",
        ),
    ],
)
def test_controlnet_files(model, lora, attention, make, singles, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(3)
    file = {k: 0.2 * torch.randn(v.shape, generator=generator) for k, v in make().items()}
    # The host takes every FLUX file for one of the full width, which it can't be here.
    tiny = comfy.supported_models.Flux(flux_config(True, depth=2, depth_single_blocks=singles))
    monkeypatch.setattr(
        comfy.model_detection, "model_config_from_unet", lambda *args, **kwargs: tiny
    )
    net = comfy.controlnet.load_controlnet_state_dict(file)
    hint = torch.rand(1, 96, 96, 3, generator=generator)

    def controlled(strength: float):
        return host_nodes.ControlNetApplyAdvanced().apply_controlnet(
            prompt(0), prompt(1), net, hint, strength, 0.0, 1.0, vae=ControlVae()
        )[0]

    conditioned = apply(model, random_condition(), lora, attention=attention)
    got = sample(conditioned, positive=controlled(1.0))
    assert relative_error(got, sample(conditioned)) > 1e-3
    assert relative_error(got, sample(model, positive=controlled(1.0))) > 1e-3
    reuse = ("every_n_steps", 1) if attention == "joint" else ("once",)
    cached = with_cache(conditioned, *reuse)
    assert torch.equal(sample(cached, positive=controlled(1.0)), got)


def denoised(model, latent: torch.Tensor, denoise: float, seed: int = 0, **options) -> torch.Tensor:
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model, noise, 4, 1.0, "euler", "simple", prompt(0), prompt(1), latent,
        denoise=denoise, disable_pbar=True, **options,
    )  # fmt: skip


@row("Neighbours", "DifferentialDiffusion and noise masks", "works")
def test_differential_diffusion(model, lora, attention) -> None:
    conditioned = apply(model, random_condition(), lora, attention=attention)
    latent = torch.randn(1, 16, 12, 12)
    mask = torch.linspace(0, 1, 12).expand(1, 1, 12, 12)

    def painted(m, node=True):
        m = output(DifferentialDiffusion.execute(m)) if node else m
        return denoised(m, latent, 0.8, noise_mask=mask)

    got = painted(conditioned)
    assert relative_error(got, painted(conditioned, node=False)) > 1e-3
    assert relative_error(got, painted(model)) > 1e-3
    reuse = ("every_n_steps", 1) if attention == "joint" else ("once",)
    assert torch.equal(painted(with_cache(conditioned, *reuse)), got)


@row(
    "Neighbours",
    "a second pass at another size (hires fix)",
    "works",
    "With placement fit; aligned conditions stay at the size that they have, which is said.",
)
def test_a_second_pass_at_another_size(model, lora, attention) -> None:
    def both(reuse):
        conditioned = apply(model, random_condition(placement="fit"), lora, attention=attention)
        conditioned = with_cache(conditioned, *reuse)
        first = denoised(conditioned, torch.zeros(1, 16, 8, 8), 1.0)
        upscaled = host_nodes.LatentUpscaleBy().upscale({"samples": first}, "bilinear", 1.5)[0]
        second = denoised(conditioned, upscaled["samples"], 0.5)
        return second, denoised(model, upscaled["samples"], 0.5)

    got, without = both(("every_n_steps", 1) if attention == "joint" else ("once",))
    assert torch.equal(got, both(("off",))[0])
    assert relative_error(got, without) > 1e-3


@row(
    "Neighbours",
    "tiled upscaling (one MODEL, a run a tile)",
    "works with a limit",
    "Every tile is a picture of its own: it sees the whole condition, as large as the tile with "
    "fit, from its upper left with aligned.",
)
def test_tiles(model, lora, attention) -> None:
    picture = torch.randn(1, 16, 16, 16)

    def tiles(m):
        return [
            denoised(m, picture[..., y : y + 8, x : x + 8], 0.4, seed=x + y)
            for y in (0, 8)
            for x in (0, 6)
        ]

    conditioned = apply(model, random_condition(placement="fit"), lora, attention=attention)
    reuse = ("every_n_steps", 1) if attention == "joint" else ("once",)
    identity.between_runs(model).clear()
    with recorded_runs(keep=True) as runs:
        got = tiles(with_cache(conditioned, *reuse))
    for tile, want, without in zip(got, tiles(conditioned), tiles(model), strict=True):
        assert torch.equal(tile, want)
        assert relative_error(tile, without) > 1e-3
    if attention == "independent":
        assert [run.reused for run in runs] == [0, 1, 1, 1]


class Stages:
    """A sampler of several stages a step, as RES4LYF has them: looks ahead, and back again."""

    offsets = (0.0, 0.5, 0.999, 0.5)

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        for high, low in itertools.pairwise(sigmas):
            slopes = []
            for offset in self.offsets:
                sigma = high + offset * (low - high)
                at = x + (sigma - high) * slopes[-1] if slopes else x
                slopes.append((at - model(at, sigma.expand(len(x)), **extra_args)) / sigma)
            x = x + (low - high) * sum(slopes) / len(slopes)
        return x


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [
        pytest.param(
            None,
            4,
            marks=row(
                "Neighbours",
                "samplers with sub-steps (RES4LYF, LanPaint)",
                "works",
                "RES4LYF (commit 022c873) and LanPaint (32cf848) run in a server by hand too.",
            ),
        ),
        pytest.param("dpmpp_sde", 2, marks=row("Neighbours", "SamplerCustomAdvanced", "works")),
    ],
)
def test_custom_samplers(model, lora, attention, sampler, evaluations) -> None:
    chosen = comfy.samplers.KSAMPLER(Stages()) if sampler is None else None
    chosen = chosen or comfy.samplers.sampler_object(sampler)
    conditioned = apply(model, random_condition(), lora, attention=attention)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 6)

    def run(m):
        guider = output(custom_sampler.BasicGuider.execute(m, prompt(0)))
        noise = output(custom_sampler.RandomNoise.execute(5))
        latent = {"samples": torch.zeros(1, 16, 8, 8)}
        return output(
            custom_sampler.SamplerCustomAdvanced.execute(noise, guider, chosen, sigmas, latent)
        )["samples"]

    got = run(conditioned)
    assert relative_error(got, run(model)) > 1e-3
    if attention == "independent":
        assert torch.equal(run(with_cache(conditioned, "once")), got)
        return
    with recorded_runs() as runs:
        run(with_cache(conditioned, "every_n_steps", 2))
    assert runs[0].refreshes == 3
    assert runs[0].evaluations in (6 * evaluations, 6 * evaluations - 1)


@row("Neighbours", "guiders with three prompts (DualCFGGuider)", "works")
def test_three_prompts(model, lora, attention) -> None:
    conditioned = apply(model, random_condition(), lora, attention=attention)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3)

    def run(m):
        guider = custom_sampler.Guider_DualCFG(m)
        guider.set_conds(prompt(0), prompt(1), prompt(2))
        guider.set_cfg(3.0, 2.0)
        latent = torch.zeros(1, 16, 8, 8)
        noise = comfy.sample.prepare_noise(latent, 0)
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True)

    got = run(conditioned)
    assert relative_error(got, run(model)) > 1e-3
    reuse = ("every_n_steps", 1) if attention == "joint" else ("once",)
    assert relative_error(run(with_cache(conditioned, *reuse)), got) < 1e-5


@row("Neighbours", "FluxGuidance and FluxDisableGuidance", "works")
@pytest.mark.parametrize("disable", [True, False])
def test_flux_guidance(model, lora, attention, disable) -> None:
    node = nodes_flux.FluxDisableGuidance if disable else nodes_flux.FluxGuidance
    guided = output(node.execute(prompt(0)) if disable else node.execute(prompt(0), 9.0))
    conditioned = apply(model, random_condition(), lora, attention=attention)
    got = sample(conditioned, positive=guided)
    assert relative_error(got, sample(conditioned)) > 1e-4
    assert relative_error(got, sample(model, positive=guided)) > 1e-3
    reuse = ("every_n_steps", 1) if attention == "joint" else ("once",)
    assert torch.equal(sample(with_cache(conditioned, *reuse), positive=guided), got)


@row("Neighbours", "Normalized Attention Guidance", "works", "The host has it since 0.33.")
def test_normalized_attention_guidance(model, lora, attention) -> None:
    nag = pytest.importorskip("comfy_extras.nodes_nag").NAGuidance

    def guided(m):
        return sample(output(nag.execute(m, 5.0, 0.5, 1.5)))

    conditioned = apply(model, random_condition(), lora, attention=attention)
    got = guided(conditioned)
    assert relative_error(got, sample(conditioned)) > 1e-4
    assert relative_error(got, guided(model)) > 1e-3
    reuse = ("every_n_steps", 1) if attention == "joint" else ("once",)
    assert relative_error(guided(with_cache(conditioned, *reuse)), got) < 1e-5


@row("Neighbours", "unloading the model between runs", "works")
def test_unloaded_between_runs(model, lora, attention) -> None:
    conditioned = with_cache(apply(model, random_condition(), lora, attention=attention))
    want = sample(conditioned)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(conditioned), want)

"""References beside everything else: conditions, areas, masks, ControlNet, LoRAs, other nodes."""

import inspect
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import comfy.model_base
import comfy.sample
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy.samplers import calculate_sigmas, sampler_object
from comfy_extras import nodes_hooks as hooks
from comfy_extras.nodes_custom_sampler import DualCFGGuider
from helpers.editing import (
    MODELS,
    Oracle,
    Tiny,
    built,
    cached,
    has,
    of_class,
    outermost,
    row,
    sample,
)
from safetensors.torch import save_file
from tiny import (
    apply,
    compact,
    random_condition,
    random_lora,
    recorded_runs,
    relative_error,
    save_lora,
)

from omini2_extension import nodes
from omini2_extension.nodes import ConditionCache, ImageGuidance
from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.host import reference_files
from omini2_extension.omini2_core.host.attach import get_setup
from omini2_extension.omini2_core.host.model import EDITING
from omini2_extension.omini2_core.host.references import (
    FAMILIES,
    KEEP_THEIR_OWN,
    REFUSED,
    Family,
)

TOLERANCE = 1e-5
KONTEXT = MODELS["Kontext"]


@pytest.fixture(scope="module")
def lora() -> str:
    return random_lora("beside_references.safetensors")


def refs(tiny: Tiny) -> list[torch.Tensor]:
    return [tiny.latent(4, 5, 1), tiny.latent(3, 4, 2)]


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return relative_error(got, want) < TOLERANCE


# --- OminiControl's conditions on the same FLUX.1 Kontext ---------------------------------------


@row("conditions of Apply Omini2 LoRA beside references, on FLUX.1 Kontext")
@pytest.mark.parametrize("attention", ["joint", "independent"])
@pytest.mark.parametrize("mode", ["joint", "isolated"])
def test_conditions_beside_references(lora: str, attention: str, mode: str) -> None:
    """References as at every step, K/V of which are replaced by hand around conditions' hooks."""
    model = apply(KONTEXT.make(), random_condition(4, 6), lora, attention=attention)
    positive, negative = KONTEXT.prompt(0, *refs(KONTEXT)), KONTEXT.prompt(1, *refs(KONTEXT))
    refresh = (lambda step: step % 2 == 0) if mode == "joint" else None
    kept = cached(model, "every_n_steps", 2, references=mode)
    with recorded_runs() as runs:
        got = sample(kept, KONTEXT, positive, negative, cfg=3.0)
    # The same conditions, and the oracle's hooks are the outer ones as ours would be.
    conditions = cached(model, "every_n_steps", 2, references="off")
    oracle = outermost(Oracle(conditions, refresh))
    assert same(got, sample(oracle, KONTEXT, positive, negative, cfg=3.0))
    assert runs[0].references is not None and runs[0].references.spared == 0.5
    assert runs[0].tokens == [24]


def test_image_guidance_keeps_two_sets_of_joint_references(lora: str) -> None:
    """They have seen the condition through the picture, so black images have others."""
    model = apply(KONTEXT.make(), random_condition(4, 6), lora)
    guided = ImageGuidance.execute(model, 1.5)[0]
    positive = KONTEXT.prompt(0, *refs(KONTEXT))
    every_step = sample(cached(guided, "off"), KONTEXT, positive)
    got = sample(cached(guided, "every_n_steps", 1), KONTEXT, positive)
    assert same(got, every_step)


def test_token_integration_beside_references(lora: str) -> None:
    mask = torch.zeros(1, 64, 96)
    mask[:, 16:48, 32:64] = 1
    condition = compact(random_condition(4, 6), token_integration=True, mask=mask)[0]
    model = apply(KONTEXT.make(), condition, lora)
    positive = KONTEXT.prompt(0, *refs(KONTEXT))
    every_step = sample(cached(model, "off"), KONTEXT, positive)
    assert same(sample(cached(model, "every_n_steps", 1), KONTEXT, positive), every_step)
    assert not same(sample(cached(model, "once"), KONTEXT, positive), every_step)


# --- the host's own features --------------------------------------------------------------------


@row("area conditioning")
@pytest.mark.parametrize("name", MODELS)
def test_areas(name: str) -> None:
    """Each part of the picture has joint references of its own."""
    tiny = MODELS[name]
    if tiny.video:
        pytest.skip("the host's areas are for latents without time")
    model = tiny.make()
    side = tiny.side
    positive = [
        *tiny.prompt(0, *refs(tiny), area=(4 * side, 3 * side, 0, 0)),
        *tiny.prompt(2, *refs(tiny), area=(4 * side, 3 * side, 0, 3 * side)),
    ]
    negative = tiny.prompt(1, *refs(tiny))
    plain = sample(model, tiny, positive, negative, cfg=3.0)
    kept = cached(model, "every_n_steps", 1)
    assert same(sample(kept, tiny, positive, negative, cfg=3.0), plain)
    once = cached(model, "once")
    assert not same(sample(once, tiny, positive, negative, cfg=3.0), plain)


@row("masks of prompts on Qwen-Image-Edit")
@pytest.mark.skipif(not has("Krea2"), reason="this host's Qwen-Image looks at no mask")
@pytest.mark.parametrize("mode", ["joint", "isolated"])
def test_masks(mode: str) -> None:
    """Qwen-Image hands its text's mask over by position."""
    tiny = MODELS["Qwen"]
    model = tiny.make()
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    positive = tiny.prompt(0, *refs(tiny), attention_mask=mask)
    refresh = (lambda step: step == 0) if mode == "joint" else None
    got = sample(cached(model, "once", references=mode), tiny, positive)
    want = sample(Oracle(model, refresh).model, tiny, positive)
    unmasked = sample(cached(model, "once", references=mode), tiny, tiny.prompt(0, *refs(tiny)))
    assert same(got, want)
    assert not same(got, unmasked)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_samplers(name: str, sampler: str) -> None:
    """Isolated references are the same for every evaluation, however often a step has one."""
    tiny = MODELS[name]
    model, positive = tiny.make(), tiny.prompt(0, *refs(tiny))
    every = cached(model, "off", references="isolated")
    once = cached(model, "once", references="isolated")
    want = sample(every, tiny, positive, sampler=sampler)
    assert same(sample(once, tiny, positive, sampler=sampler), want)


@row("Edit Model Reference Method")
@pytest.mark.parametrize("method", ["offset", "index", "uxo", "index_timestep_zero"])
@pytest.mark.parametrize("name", ["Kontext", "FLUX.2 klein", "Qwen"])
def test_methods_of_placing_references(name: str, method: str) -> None:
    """Isolated ones lie where the host's own code places them beside the whole picture."""
    tiny = MODELS[name]
    model = tiny.make()
    positive = tiny.prompt(0, *refs(tiny), reference_latents_method=method)
    got = sample(cached(model, "once", references="isolated"), tiny, positive)
    assert same(got, sample(Oracle(model, None).model, tiny, positive))
    if name == "FLUX.2 klein" or method != "index_timestep_zero":
        got = sample(cached(model, "once"), tiny, positive)
        assert same(got, sample(Oracle(model, lambda step: step == 0).model, tiny, positive))


@row("ControlNet")
@pytest.mark.parametrize("mode", ["joint", "isolated"])
@pytest.mark.parametrize("name", ["Kontext", "Qwen"])
def test_what_a_controlnet_adds_to_the_picture(name: str, mode: str) -> None:
    tiny = MODELS[name]
    model = tiny.make()
    added = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(3))

    def control(executor: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        given = bound.arguments
        wants = "control" in bound.signature.parameters
        (given if wants else given["kwargs"])["control"] = {"input": [added], "output": [added]}
        return executor(*bound.args, **bound.kwargs)

    def controlled(patched: Any) -> Any:
        patched = patched.clone()
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "control", control)
        return patched

    positive = tiny.prompt(0, *refs(tiny))
    refresh = (lambda step: step == 0) if mode == "joint" else None
    got = sample(controlled(cached(model, "once", references=mode)), tiny, positive)
    want = sample(Oracle(controlled(model), refresh).model, tiny, positive)
    assert same(got, want)
    assert not same(got, sample(cached(model, "once", references=mode), tiny, positive))


def shuffled(model: Any) -> Any:
    """Another extension evaluates the rows of a batch in another order."""
    model = model.clone()

    def turned(apply: Any, args: dict[str, Any]) -> torch.Tensor:
        back = torch.arange(len(args["input"])).flip(0)
        c = {
            key: [t[back] for t in value]
            if key == "ref_latents"
            else value[back]
            if isinstance(value, torch.Tensor)
            else value
            for key, value in args["c"].items()
        }
        return apply(args["input"][back], args["timestep"][back], **c)[back]

    model.set_model_unet_function_wrapper(turned)
    return model


@pytest.mark.parametrize("mode", ["joint", "isolated"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_in_another_order(name: str, mode: str) -> None:
    tiny = MODELS[name]
    model = cached(tiny.make(), "once", references=mode)
    each = [tiny.latent(4, 5, 1, batch=2)]
    prompts = tiny.prompt(0, *each), tiny.prompt(1, *each)
    want = sample(model, tiny, *prompts, cfg=3.0, batch=2)
    assert same(sample(shuffled(model), tiny, *prompts, cfg=3.0, batch=2), want)


def tiled(model: Any) -> Any:
    """Another extension evaluates the left and the right half of the picture apart."""
    model = model.clone()

    def halves(apply: Any, args: dict[str, Any]) -> torch.Tensor:
        x, middle = args["input"], args["input"].shape[-1] // 2
        parts = (x[..., :middle], x[..., middle:])
        return torch.cat([apply(part, args["timestep"], **args["c"]) for part in parts], -1)

    model.set_model_unet_function_wrapper(halves)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_tiles_of_the_picture_are_never_mixed_up(name: str) -> None:
    """Joint references have seen one of them, so nothing is kept; isolated ones are the same."""
    tiny = MODELS[name]
    model, positive = tiny.make(), tiny.prompt(0, *refs(tiny))
    plain = sample(tiled(model), tiny, positive)
    assert torch.equal(sample(tiled(cached(model, "once")), tiny, positive), plain)
    every = sample(tiled(cached(model, "off", references="isolated")), tiny, positive)
    once = sample(tiled(cached(model, "once", references="isolated")), tiny, positive)
    assert same(once, every)


@pytest.mark.skipif(not has("Krea2"), reason="this host has no Flux KV Cache")
def test_the_hosts_own_node_is_what_is_refused() -> None:
    from comfy_extras.nodes_flux import FluxKVCache

    tiny = MODELS["FLUX.2 klein"]
    with pytest.raises(Omini2Error, match=r"references: Flux KV Cache"):
        cached(FluxKVCache.execute(tiny.make())[0])


@row("ordinary LoRAs", note="They act on references as ComfyUI has it.")
def test_an_ordinary_lora_acts_on_references(lora: str) -> None:
    model = KONTEXT.make()
    weights = {
        "diffusion_model.img_in.lora_A.weight": torch.randn(2, 64) * 0.1,
        "diffusion_model.img_in.lora_B.weight": torch.randn(32, 2) * 0.1,
    }
    styled, _ = comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0)
    positive = KONTEXT.prompt(0, *refs(KONTEXT))
    with recorded_runs(keep=True) as runs:
        plain = sample(cached(model, "once", references="isolated"), KONTEXT, positive)
        got = sample(cached(styled, "once", references="isolated"), KONTEXT, positive)
    assert [run.reused for run in runs] == [0, 0]
    assert same(got, sample(Oracle(styled, None).model, KONTEXT, positive))
    assert not same(got, plain)


@pytest.mark.parametrize("keyframes", [False, True])
@pytest.mark.parametrize("name", ["Kontext", "FLUX.2 klein"])
def test_a_lora_hooked_onto_one_prompt(name: str, keyframes: bool) -> None:
    """Prompts share isolated K/V only where they share weights, and steps as well."""
    tiny = MODELS[name]
    model, prompt = tiny.make(), tiny.prompt(0, *refs(tiny))
    layer = "diffusion_model.double_blocks.0.img_attn.qkv"
    draw = torch.Generator().manual_seed(0)
    weights = {
        f"{layer}.lora_A.weight": torch.randn(2, 32, generator=draw),
        f"{layer}.lora_B.weight": torch.randn(96, 2, generator=draw),
    }
    file = save_lora("hooked.safetensors", weights)
    (hook,) = hooks.CreateHookLoraModelOnly().create_hook_model_only(file, 0.3)
    if keyframes:
        (frame,) = hooks.CreateHookKeyframe().create_hook_keyframe(1.0, 0.0)
        (frame,) = hooks.CreateHookKeyframe().create_hook_keyframe(0.2, 0.5, frame)
        (hook,) = hooks.SetHookKeyframes().set_hook_keyframes(hook, frame)
    (hooked,) = hooks.SetModelHooksOnCond().attach_hook(prompt, hook)

    def run(reuse: str, positive: Any) -> torch.Tensor:
        kept = cached(model, reuse, references="isolated")
        return sample(kept, tiny, positive, prompt, cfg=3.0, steps=6)

    got, plain = run("once", hooked), run("once", prompt)
    assert same(got, run("off", hooked)) and same(plain, run("off", prompt))
    assert not same(got, plain)


@pytest.mark.parametrize(
    ("name", "reused"), [("Kontext", 0), ("FLUX.2 klein", 1), ("FLUX.2 dev", 1), ("Qwen", 1)]
)
def test_another_prompt_finds_isolated_references(name: str, reused: int) -> None:
    """But on FLUX.1, where a prompt's pooled text goes into them; and positive and negative."""
    tiny = MODELS[name]
    model = cached(tiny.make(), "once", references="isolated")
    with recorded_runs(keep=True) as runs:
        first = sample(
            model, tiny, tiny.prompt(0, *refs(tiny)), tiny.prompt(1, *refs(tiny)), cfg=3.0
        )
        sample(model, tiny, tiny.prompt(3, *refs(tiny)))
    assert first.isfinite().all()
    stats = runs[0].references
    assert stats is not None and stats.computed == (2 if not reused else 1)
    assert runs[1].reused == reused


def test_other_references_are_never_served_stale() -> None:
    tiny = MODELS["FLUX.2 klein"]
    model = cached(tiny.make(), "once", references="isolated")
    sample(model, tiny, tiny.prompt(0, *refs(tiny)))
    for changed in ([2 * t for t in refs(tiny)], refs(tiny)[:1], refs(tiny)[::-1]):
        got = sample(model, tiny, tiny.prompt(0, *changed))
        want = sample(
            cached(tiny.make(), "once", references="isolated"), tiny, tiny.prompt(0, *changed)
        )
        assert same(got, want)


@pytest.mark.parametrize("mode", ["joint", "isolated"])
def test_references_of_a_prompt_that_cfg_1_would_leave_out(mode: str) -> None:
    """Guiders and samplers of their own evaluate the negative prompt whatever cfg is."""
    positive, negative = KONTEXT.prompt(0), KONTEXT.prompt(1, *refs(KONTEXT))
    model = KONTEXT.make()
    refresh = (lambda step: step == 0) if mode == "joint" else None
    kept = cached(model, "once", references=mode)
    got = dual(kept, positive, negative)
    assert same(got, dual(Oracle(model, refresh).model, positive, negative))
    assert not same(got, dual(model, positive, negative))
    options = {"sampler": "euler_cfg_pp", "cfg": 1.0}
    got = sample(kept, KONTEXT, positive, negative, **options)
    assert same(got, sample(Oracle(model, refresh).model, KONTEXT, positive, negative, **options))
    assert not same(got, sample(model, KONTEXT, positive, negative, **options))


def dual(model: Any, positive: list[Any], negative: list[Any]) -> torch.Tensor:
    """Dual CFG Guider, which has no cfg of its own."""
    guider = DualCFGGuider.execute(model, positive, positive, negative, 3.0, 2.0, "regular")[0]
    latent = torch.zeros_like(KONTEXT.latent(4, 6, 0))
    sigmas = calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    return guider.sample(
        comfy.sample.prepare_noise(latent, 0), latent, sampler_object("euler"), sigmas, seed=0,
        disable_pbar=True,
    )  # fmt: skip


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["joint", "isolated"])
@pytest.mark.parametrize("name", MODELS)
def test_out_of_memory_keeps_less(name: str, mode: str) -> None:
    tiny = MODELS[name]
    model, positive = tiny.make(), tiny.prompt(0, *refs(tiny))
    inner = model.model.diffusion_model
    own, calls = inner._forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return own(*args, **kwargs)

    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    want = sample(cached(model, "once", references=mode, storage="fp8"), tiny, positive)
    with mock.patch.object(inner, "_forward", forward), recorded_runs() as runs:
        got = sample(cached(model, "once", references=mode), tiny, positive)
    assert runs[0].storage == "fp8"
    assert relative_error(got, want) < 0.05


@pytest.mark.parametrize("reuse", ["once", "off"])
def test_out_of_memory_where_nothing_is_left_to_move(reuse: str) -> None:
    """Whether K/V are away already, or are computed at every step and so never kept."""
    tiny = KONTEXT
    model, positive = tiny.make(), tiny.prompt(0, *refs(tiny))
    kept = cached(model, reuse, references="isolated", keep_on="cpu")
    full = mock.patch.object(
        model.model.diffusion_model, "_forward", side_effect=torch.OutOfMemoryError("no room")
    )
    with full as forward, pytest.raises(torch.OutOfMemoryError) as caught:
        forward.__signature__ = inspect.signature(full.temp_original)
        sample(kept, tiny, positive)
    assert str(caught.value) == (
        "image: the device ran out of memory; connect fewer or smaller references or choose a "
        "smaller width and height."
    )


class Stop(Exception):
    pass


@pytest.mark.parametrize("mode", ["joint", "isolated"])
def test_a_run_that_is_stopped_leaves_nothing_half_done(mode: str) -> None:
    tiny = KONTEXT
    model, positive = tiny.make(), tiny.prompt(0, *refs(tiny))
    kept = cached(model, "once", references=mode)
    calls: list[int] = []

    def stop(q: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        return attention(q, *args, **kwargs)

    import comfy.ldm.flux.math as math

    attention = math.optimized_attention
    before = kept.model_options["transformer_options"].copy()
    with mock.patch.object(math, "optimized_attention", stop), pytest.raises(Stop):
        sample(kept, tiny, positive)
    assert kept.model_options["transformer_options"].keys() == before.keys()
    fresh = cached(tiny.make(), "once", references=mode)
    assert same(sample(kept, tiny, positive), sample(fresh, tiny, positive))


def test_blocks_that_compute_past_the_hosts_attention() -> None:
    """Joint references stay what the model makes of them; isolated ones are refused."""
    tiny = KONTEXT
    model, positive = tiny.make(), tiny.prompt(0, *refs(tiny))
    want = sample(model, tiny, positive)

    def deaf(q: Any, k: Any, v: Any, pe: Any, mask: Any = None, **_: Any) -> Any:
        from comfy.ldm.flux.math import attention

        return attention(q, k, v, pe, mask)

    with mock.patch("comfy.ldm.flux.layers.attention", deaf):
        assert torch.equal(sample(cached(model, "once"), tiny, positive), want)
        with pytest.raises(Omini2Error, match=r"references: .*past ComfyUI's.*references to off"):
            sample(cached(model, "once", references="isolated"), tiny, positive)


# --- which models, and what a file says ---------------------------------------------------------


def test_the_table_names_what_other_nodes_name() -> None:
    assert {family.base for family in FAMILIES} == {"Flux", *EDITING}


class KV_Attn_Input:
    """What Flux KV Cache puts onto a model."""

    def __call__(self, q: Any, k: Any, v: Any, **_: Any) -> dict[str, Any]:
        return {}


@row("Flux KV Cache on the same MODEL", "refused")
def test_flux_kv_cache_on_the_same_model_is_refused() -> None:
    tiny = KONTEXT
    model = tiny.make().clone()
    model.set_model_attn1_patch(KV_Attn_Input())
    with pytest.raises(Omini2Error, match=r"references: Flux KV Cache .* references to off"):
        cached(model)
    cached(model, references="off")
    later = cached(tiny.make())
    later.set_model_attn1_patch(KV_Attn_Input())
    with pytest.raises(Omini2Error, match="references: Flux KV Cache"):
        sample(later, tiny, tiny.prompt(0, *refs(tiny)))


@pytest.mark.skipif(not has("Krea2"), reason="this host has no Krea 2")
def test_krea2_without_a_method_ignores_references(caplog: pytest.LogCaptureFixture) -> None:
    tiny = MODELS["Krea 2"]
    model = tiny.make()
    positive = tiny.prompt(0, *refs(tiny), reference_latents_method=None)
    want = sample(model, tiny, positive)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample(cached(model, "once"), tiny, positive), want)
    assert caplog.text.count("ignores references") == 1
    isolated = sample(cached(model, "once", references="isolated"), tiny, positive)
    by_method = sample(Oracle(model, None).model, tiny, tiny.prompt(0, *refs(tiny)))
    assert same(isolated, by_method)


JOYIMAGE = {
    "image_model": "joyimage",
    "hidden_size": 64,
    "num_attention_heads": 2,
    "text_dim": 24,
    "num_layers": 1,
    "rope_dim_list": [8, 12, 12],
}


def test_names_of_models_are_the_hosts() -> None:
    newer = {"QwenImage21"}  # since 0.37
    missing = {name for name in (*REFUSED, *KEEP_THEIR_OWN) if not hasattr(comfy.model_base, name)}
    assert missing <= newer or not has("Krea2")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("Omnigen2", marks=row("OmniGen2", "refused")),
        pytest.param("Boogu", marks=row("Boogu", "refused")),
        pytest.param("Lumina2", marks=row("Z-Image Omni", "refused")),
    ],
)
def test_models_whose_references_cannot_be_kept_are_named(name: str) -> None:
    with pytest.raises(Omini2Error, match=rf"model: this is {name} .*be kept \(.*\); load FLUX"):
        cached(of_class(name))


@row("JoyImage", "refused")
@pytest.mark.skipif(not has("JoyImage"), reason="this host has no JoyImage")
def test_joyimage_is_refused_by_its_name() -> None:
    model = built("JoyImage", JOYIMAGE)
    with pytest.raises(Omini2Error, match=r"this is JoyImage .*between picture and text"):
        cached(model)


@row("HiDream-O1, Qwen-Image 2.1", note="Left alone, which is said: they keep their own.")
@pytest.mark.parametrize("name", KEEP_THEIR_OWN)
def test_a_model_that_keeps_its_own_is_left_alone(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = of_class(name)
    with caplog.at_level(logging.WARNING):
        assert ConditionCache.execute(model, "auto", 5, "model", "auto")[0] is model
    assert "keeps its references' keys and values itself" in caplog.text


def write(name: str, folder: str = "loras", **metadata: str) -> Path:
    place = Path(folder_paths.get_folder_paths(folder)[0])
    place.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.zeros(1)}, place / name, metadata or None)
    folder_paths.filename_list_cache.clear()
    return place / name


@pytest.mark.parametrize(
    ("name", "metadata", "isolated"),
    [
        ("flux-2-klein-9b-kv-fp8.safetensors", {}, True),
        ("flux2_klein_9b_kv.safetensors", {}, True),
        ("flux-2-klein-9b.safetensors", {}, False),
        ("my_edit_kv_cache.safetensors", {}, True),
        ("krea.safetensors", {"config": json.dumps({"model": {"kv_cache": True}})}, True),
        ("krea_joint.safetensors", {"config": json.dumps({"model": {"kv_cache": False}})}, False),
    ],
)
def test_auto_believes_the_file(name: str, metadata: dict[str, str], isolated: bool) -> None:
    path = write(name, **metadata)
    assert reference_files.says_isolated(KONTEXT.make(), [path]) is isolated
    path.unlink()


class Loader:
    """A node of the host's that gives a MODEL."""

    RETURN_TYPES = ("MODEL",)


@pytest.mark.parametrize("behind", [True, False])
def test_auto_reads_the_files_that_the_graph_names(behind: bool) -> None:
    path = write("graph_kv_cache.safetensors")
    graph = {
        "1": {"class_type": "Loader", "inputs": {"unet_name": "other.safetensors"}},
        "2": {"class_type": "Loader", "inputs": {"model": ["1", 0], "lora_name": path.name}},
        "3": {"class_type": "Cache", "inputs": {"model": ["2" if behind else "1", 0]}},
    }
    host = SimpleNamespace(NODE_CLASS_MAPPINGS={"Loader": Loader})
    node = SimpleNamespace(hidden=SimpleNamespace(prompt=graph, unique_id="3"))
    with mock.patch.dict("sys.modules", {"nodes": host}):
        files = reference_files.graph_files(node)
    assert reference_files.says_isolated(KONTEXT.make(), files) is behind
    path.unlink()


def test_auto_is_joint_where_no_file_says_otherwise() -> None:
    auto = nodes.ConditionCache.execute(KONTEXT.make(), "auto", 5, "model", "auto")[0]
    assert get_setup(auto).references == "joint"


@pytest.mark.skipif(not has("Krea2"), reason="this host doesn't tell how many tokens there are")
@pytest.mark.parametrize("mode", ["joint", "isolated"])
def test_a_model_that_counts_its_references_otherwise_is_refused(mode: str) -> None:
    tiny = MODELS["FLUX.2 klein"]
    model = cached(tiny.make(), references=mode)
    with (
        mock.patch.object(Family, "tokens", lambda *_: 30),
        pytest.raises(Omini2Error, match=r"references: .*32 tokens .* 30 were counted"),
    ):
        sample(model, tiny, tiny.prompt(0, *refs(tiny)))


@row("torch.compile")
@pytest.mark.parametrize("references", ["joint", "isolated"])
def test_torch_compile(references: str) -> None:
    """Calls with references and calls without are two pieces of code."""
    torch.compiler.reset()  # code of other tests asks for options that these runs lack
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    kept = cached(KONTEXT.make(), "once", references=references)
    positive = KONTEXT.prompt(0, *refs(KONTEXT))
    compiled = TorchCompileModel.execute(kept, "eager")[0]
    want = sample(kept, KONTEXT, positive)
    assert relative_error(sample(compiled, KONTEXT, positive), want) < 1e-4


@row("EasyCache")
@pytest.mark.parametrize("order", ["before", "behind"])
def test_easycache_skips_the_same_steps(order: str) -> None:
    """The host's own cache: it wraps the model's forward as well."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    def easy(model: Any) -> Any:
        return EasyCacheNode.execute(model, 0.3, 0.1, 0.95, False).args[0]

    def kept(model: Any) -> Any:
        return cached(model, "every_n_steps", 1)

    model, positive = KONTEXT.make(), KONTEXT.prompt(0, *refs(KONTEXT))
    both = kept(easy(model)) if order == "before" else easy(kept(model))
    got = sample(both, KONTEXT, positive, steps=10)
    want = sample(easy(model), KONTEXT, positive, steps=10)
    assert same(got, want)
    assert not same(want, sample(model, KONTEXT, positive, steps=10))

"""Omini2 Reference beside everything else: conditions, the host's nodes, other extensions."""

import logging
import math
from typing import Any
from unittest import mock

import nodes as host_nodes
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from helpers.editing import MODELS, Oracle, cached, has, outermost, sample
from helpers.reference import image, refer, stock, token_mask
from tiny import apply, compact, random_condition, random_lora, recorded_runs, relative_error

from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.host import reference_settings, versions

TOLERANCE = 1e-5
KONTEXT = MODELS["Kontext"]


@pytest.fixture(scope="module")
def lora() -> str:
    return random_lora("beside_reference_node.safetensors")


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return relative_error(got, want) < TOLERANCE


# --- OminiControl's conditions on the same FLUX.1 Kontext ---------------------------------------


@pytest.mark.parametrize("how", ["off", "joint", "isolated"])
@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_conditions_beside_a_reference_with_a_strength(lora: str, attention: str, how: str) -> None:
    model = apply(KONTEXT.make(), random_condition(4, 6), lora, attention=attention)
    pixels = image(4, 5)
    patched, positive, negative = refer(
        model, KONTEXT, KONTEXT.prompt(0), pixels, KONTEXT.prompt(1), strength=0.3
    )
    kept = cached(patched, "every_n_steps", 2, references=how)
    got = sample(kept, KONTEXT, positive, negative, cfg=3)
    refresh = {"off": lambda step: True, "joint": lambda step: step % 2 == 0, "isolated": None}[how]
    conditions = cached(model, "every_n_steps", 2, references="off")
    oracle = outermost(Oracle(conditions, refresh, [math.log(0.3)] * 20))
    prompts = (KONTEXT.prompt(i, stock(KONTEXT, pixels)) for i in (0, 1))
    assert same(got, sample(oracle, KONTEXT, *prompts, cfg=3))


@pytest.mark.parametrize("how", ["off", "joint", "isolated"])
def test_token_integration_beside_a_reference(lora: str, how: str) -> None:
    """Some tokens of the picture and some of the reference are left out of the same sequence."""
    paint = torch.zeros(1, 64, 96)
    paint[:, 16:48, 32:64] = 1
    condition = compact(random_condition(4, 6), token_integration=True, mask=paint)[0]
    model = apply(KONTEXT.make(), condition, lora)
    mask = token_mask([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]])

    def run(strength: float, **options: Any) -> torch.Tensor:
        patched, positive, _ = refer(
            model, KONTEXT, KONTEXT.prompt(0), image(3, 4), strength=strength, **options
        )
        return sample(cached(patched, "every_n_steps", 1, references=how), KONTEXT, positive)

    none = sample(cached(model, "every_n_steps", 1, references=how), KONTEXT, KONTEXT.prompt(0))
    weak = run(1e-30, mask=mask)
    assert same(run(0, mask=mask), none)
    # A joint condition sees the reference as it is, so only nearly nothing of it is left.
    assert relative_error(weak, none) < 0.02 < relative_error(run(1.0, mask=mask), none)
    assert not same(run(1.0, mask=mask), run(1.0))


# --- the host's nodes ----------------------------------------------------------------------------


@pytest.fixture
def referred() -> Any:
    """A prompt with a reference that has a strength, and the model."""
    return refer(KONTEXT.make(), KONTEXT, KONTEXT.prompt(0), image(4, 5), strength=0.3)


def call(kind: str, *args: Any, **options: Any) -> Any:
    """One of the host's nodes."""
    node = host_nodes.NODE_CLASS_MAPPINGS[kind]
    return getattr(node(), node.FUNCTION)(*args, **options)[0]


def passed_on(prompt: list[Any]) -> list[float | None]:
    """The strengths of a prompt's references, as a run finds them."""
    found = []
    for _, said in prompt:
        references = reference_settings.references_of(said)
        settings = () if references is None else references.settings
        found += [None if each is None else each.strength for each in settings]
    return found


def test_what_is_said_goes_through_the_host_s_nodes(referred: Any) -> None:
    _, positive, _ = referred
    plain = KONTEXT.prompt(1)
    area = (64, 64, 0, 0, 1.0)
    for prompt in (
        call("ConditioningCombine", plain, positive),
        call("ConditioningAverage", positive, plain, 0.5),
        call("ConditioningConcat", positive, plain),
        call("ConditioningSetArea", positive, *area),
        call("ConditioningSetAreaPercentage", positive, 0.5, 0.5, 0, 0, 1.0),
        call("ConditioningSetMask", positive, torch.ones(1, 64, 96), "default", 1.0),
        call("ConditioningSetTimestepRange", positive, 0.2, 0.8),
        call("ConditioningZeroOut", positive),
    ):
        assert passed_on(prompt) == [0.3]
    # These take the text of the second prompt only.
    assert passed_on(call("ConditioningAverage", plain, positive, 0.5)) == []
    assert passed_on(call("ConditioningConcat", plain, positive)) == []


@pytest.mark.parametrize("how", ["off", "joint", "isolated"])
def test_areas_and_ranges_of_prompts(how: str) -> None:
    """A prompt's own range goes before the reference's, and each area has its own."""
    model, pixels = KONTEXT.make(), image(4, 5)
    patched, positive, negative = refer(
        model, KONTEXT, KONTEXT.prompt(0), pixels, KONTEXT.prompt(1), strength=0.3
    )

    def parts(prompt: list[Any]) -> list[Any]:
        late = call("ConditioningSetTimestepRange", prompt, 0.5, 1.0)
        return call(
            "ConditioningCombine", prompt, call("ConditioningSetArea", late, 64, 48, 0, 0, 1)
        )

    kept = cached(patched, "every_n_steps", 1, references=how)
    got = sample(kept, KONTEXT, parts(positive), negative, cfg=3)
    refresh = None if how == "isolated" else lambda step: True
    plain = [KONTEXT.prompt(i, stock(KONTEXT, pixels)) for i in (0, 1)]
    oracle = Oracle(model, refresh, [math.log(0.3)] * 20).model
    assert same(got, sample(oracle, KONTEXT, parts(plain[0]), plain[1], cfg=3))


def test_a_latent_that_another_node_copies_is_the_same_one(referred: Any) -> None:
    _, positive, _ = referred
    said = positive[0][1]
    said["reference_latents"] = [latent.clone() for latent in said["reference_latents"]]
    assert passed_on(positive) == [0.3]


def test_two_of_the_same_latent_keep_their_own(referred: Any) -> None:
    _, positive, _ = referred
    (latent,) = positive[0][1]["reference_latents"]
    stock_before = KONTEXT.prompt(0, latent.clone())
    both = reference_settings.with_reference(stock_before, positive[0][1]["omini2_references"][0])
    assert passed_on(both) == [None, 0.3]


def test_a_latent_that_another_node_changes_is_refused(referred: Any) -> None:
    model, positive, _ = referred
    said = positive[0][1]
    said["reference_latents"] = [2 * latent for latent in said["reference_latents"]]
    with pytest.raises(Omini2Error, match=r"image: another node has changed .*behind that node"):
        sample(model, KONTEXT, positive)
    said["reference_latents"] = []
    sample(model, KONTEXT, positive)


# --- other extensions ----------------------------------------------------------------------------


def wrapped(model: Any, keep: Any) -> Any:
    """Another extension calls the model, with what it keeps of the arguments."""
    model = model.clone()

    def call_on(apply: Any, args: dict[str, Any]) -> torch.Tensor:
        return apply(args["input"], args["timestep"], **keep(args["c"]))

    model.set_model_unet_function_wrapper(call_on)
    return model


def test_an_extension_that_drops_what_is_said_is_refused(referred: Any) -> None:
    model, positive, _ = referred
    known = ("c_crossattn", "y", "guidance", "ref_latents", "transformer_options")
    dropping = wrapped(model, lambda c: {k: v for k, v in c.items() if k in known})
    with pytest.raises(Omini2Error, match=r"Omini2 Reference says .* can't be told"):
        sample(dropping, KONTEXT, positive)
    same_all = wrapped(model, lambda c: c)
    assert torch.equal(sample(same_all, KONTEXT, positive), sample(model, KONTEXT, positive))


@pytest.mark.parametrize("setting", [{"strength": 0.3}, {"mask": token_mask([[1, 0, 0, 1]] * 3)}])
def test_a_forward_past_the_host_s_hooks_is_refused(setting: dict[str, Any]) -> None:
    model, positive, _ = refer(KONTEXT.make(), KONTEXT, KONTEXT.prompt(0), image(3, 4), **setting)
    inner = model.model.diffusion_model

    def forward(img: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(img.shape[0], img.shape[1], 64)

    with (
        mock.patch.object(inner, "forward_orig", forward),
        pytest.raises(Omini2Error, match="model: another extension has replaced its forward"),
    ):
        sample(model, KONTEXT, positive)
    sample(model, KONTEXT, positive)


def test_attention_that_takes_no_masks(referred: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As sage attention may: PyTorch's takes its place, which is said."""
    model, positive, _ = referred
    want = sample(model, KONTEXT, positive)

    def deaf(function: Any, q: Any, k: Any, v: Any, heads: int, **options: Any) -> torch.Tensor:
        options.pop("mask", None)
        return function(q, k, v, heads, **options)

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = deaf
    with caplog.at_level(logging.WARNING):
        assert same(sample(model, KONTEXT, positive), want)
    assert "strength: the attention that is switched on takes no masks" in caplog.text


def test_easycache_may_skip_steps(referred: Any) -> None:
    from comfy_extras.nodes_easycache import EasyCacheNode

    model, positive, _ = referred
    easy = EasyCacheNode.execute(model, 0.3, 0.1, 0.95, False).args[0]
    got = sample(easy, KONTEXT, positive, steps=10)
    assert got.isfinite().all()
    assert not same(got, sample(model, KONTEXT, positive, steps=10))


def test_another_model_without_our_nodes_is_left_alone(referred: Any) -> None:
    """As its prompt stays a stock one."""
    _, positive, _ = referred
    model = KONTEXT.make()
    prompt = KONTEXT.prompt(0, *positive[0][1]["reference_latents"])
    assert torch.equal(sample(model, KONTEXT, positive), sample(model, KONTEXT, prompt))


# --- what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_size_that_the_model_would_shift_is_said(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = MODELS[name]
    with caplog.at_level(logging.WARNING):
        for size in ((4, 6), (4, 5)):
            model, positive, _ = refer(tiny.make(), tiny, tiny.prompt(0), image(*size))
            sample(model, tiny, positive, steps=1)
    (line,) = [m for m in caplog.messages if "this reference" in m]
    centred = name.startswith("Qwen") or name == "Mage-Flow"
    assert "picture is 96x64 and this reference 80x64" in line and "fit to picture" in line
    assert ("lays the centre of" if centred else "lays the upper left of") in line


def test_a_compact_reference_has_the_size_that_it_stands_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        for correcting in (True, False):
            model, positive, _ = refer(
                KONTEXT.make(), KONTEXT, KONTEXT.prompt(0), image(4, 6), compression=0.5,
                position_correcting=correcting,
            )  # fmt: skip
            sample(model, KONTEXT, positive, steps=1)
    (line,) = [m for m in caplog.messages if "this reference" in m]
    assert "this reference 48x32" in line


def test_figures_and_room_count_the_tokens_that_take_part() -> None:
    mask = token_mask([[1, 0, 0, 1]] * 3)
    model, positive, _ = refer(KONTEXT.make(), KONTEXT, KONTEXT.prompt(0), image(3, 4), mask=mask)
    whole, prompt, _ = refer(KONTEXT.make(), KONTEXT, KONTEXT.prompt(0), image(3, 4))
    with recorded_runs() as runs:
        sample(cached(model, "once"), KONTEXT, positive)
        sample(cached(whole, "once"), KONTEXT, prompt)
    (few, all_of_them) = (run.references for run in runs)
    assert few is not None and all_of_them is not None
    assert (few.count, few.tokens, all_of_them.tokens) == (1, 6, 12)
    assert 2 * runs[0].kv_bytes == runs[1].kv_bytes > 0


def test_which_models_have_the_hook() -> None:
    for name, tiny in MODELS.items():
        inner = type(tiny.make().model.diffusion_model)
        assert versions.calls_post_input(inner) is (has("Krea2") or not name.startswith("Qwen"))


def test_the_wrapper_is_there_once() -> None:
    model, positive, _ = refer(KONTEXT.make(), KONTEXT, KONTEXT.prompt(0), image(3, 4))
    model, positive, _ = refer(model, KONTEXT, positive, image(3, 4, 1))
    wrappers = model.get_wrappers(WrappersMP.OUTER_SAMPLE, "omini2")
    assert len(wrappers) == 1

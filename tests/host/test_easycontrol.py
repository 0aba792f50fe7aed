"""EasyControl's LoRAs on the same engine: their numbers, their rules, beside OminiControl's."""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import comfy.sd
import folder_paths
import pytest
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import (
    Case,
    Reference,
    apply,
    compact,
    encode,
    flux_config,
    make_model,
    prompt,
    random_condition,
    random_easycontrol_lora,
    random_lora,
    record,
    recorded_runs,
    reference,
    relative_error,
    sample,
    save_lora,
    with_cache,
)
from torch import Tensor

from omini2_extension.omini2_core.engine.run import Run
from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.host.attach import get_setup
from omini2_extension.omini2_core.host.hooks import Hooks
from omini2_extension.omini2_core.lora.family import EASYCONTROL, OMINICONTROL, family_of
from omini2_extension.omini2_core.tokens.condition import pack

TOLERANCE = 1e-5
PLACEMENT = {"spatial": "fit", "subject": "easycontrol_subject"}


@pytest.fixture(scope="module")
def easy() -> list[str]:
    return [random_easycontrol_lora(f"easy{seed}.safetensors", seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def omini() -> str:
    return random_lora("omini.safetensors")


# --- the original's numbers --------------------------------------------------------------------


def build(ref: Reference, case: Case) -> ModelPatcher:
    """The graph of a case: one Condition Encode and one Apply per condition."""
    model = ref.model()
    for k, cond in enumerate(case.meta["conds"]):
        latent = case.tensors[f"cond{k}.latent"]
        condition = encode(latent, placement=PLACEMENT[cond["kind"]])
        model = apply(model, condition, ref.lora_file(cond["lora"]), strength=cond["weight"])
    return model


@pytest.mark.parametrize("name", reference("easycontrol").meta["cases"])
def test_velocity_is_the_originals(name) -> None:
    ref = reference("easycontrol")
    case = ref.case(name)
    model = build(ref, case)
    every_step = record(model, case)
    want = case.tensors["pred_cached_once"]
    assert relative_error(torch.stack([pack(v) for v in every_step]), want) < TOLERANCE
    with recorded_runs() as runs:
        assert torch.equal(record(with_cache(model), case), every_step)
    assert runs[0].refreshes == 1  # auto: independent, so once


# --- their rules -------------------------------------------------------------------------------


def kv_of(model: ModelPatcher, **options) -> list[list[tuple[Tensor, Tensor]]]:
    """K/V per condition and block, as the picture sees them in a one-step run."""
    gathered: dict[int, list[tuple[Tensor, Tensor]]] = {}
    before = Run._before

    def spy(run, number):
        before(run, number)
        for index, each in enumerate(run._passes):
            kept = [(kv.k.expand(n, -1, -1, -1), kv.v.expand(n, -1, -1, -1))
                    for rows, kv in each.now.spans for n in [rows.stop - rows.start]]  # fmt: skip
            whole = tuple(torch.cat(tensors).clone() for tensors in zip(*kept, strict=True))
            gathered.setdefault(index, []).append(whole)

    with mock.patch.object(Run, "_before", spy):
        sample(model, steps=1, **options)
    return [gathered[index] for index in sorted(gathered)]


def difference(a, b) -> float:
    """The largest relative error between two conditions' K/V."""
    pairs = [(x, y) for blocks in zip(a, b, strict=True) for x, y in zip(*blocks, strict=True)]
    return max(relative_error(x, y) for x, y in pairs)


def test_guidance_is_the_conditionings(model, easy, omini) -> None:
    """EasyControl's branch follows the prompt's guidance, OminiControl's stays at 1."""
    for lora, same in ((easy[0], False), (omini, True)):
        conditioned = apply(model, random_condition(), lora, attention="independent")
        low, high = (kv_of(conditioned, positive=prompt(guidance=g))[0] for g in (1.0, 4.0))
        assert (difference(low, high) == 0) is same


def test_no_guidance_is_no_guidance_for_the_branch_either(model, easy, omini) -> None:
    """As with the host's FluxDisableGuidance."""
    none = prompt(guidance=None)
    conditioned = apply(model, random_condition(), easy[0])
    assert difference(kv_of(conditioned, positive=none)[0], kv_of(conditioned)[0]) > 0.01
    conditioned = apply(model, random_condition(), omini, attention="independent")
    assert difference(kv_of(conditioned, positive=none)[0], kv_of(conditioned)[0]) == 0


@pytest.mark.parametrize("reuse", ["off", "once"])
def test_prompts_with_different_guidance_have_their_own_kv(model, easy, reuse) -> None:
    """The same pooled text with another guidance is another branch."""
    cached = with_cache(apply(model, random_condition(), easy[0]), reuse)
    low, high = prompt(guidance=1.0), prompt(guidance=4.0)
    alone = sample(cached, positive=low)
    assert relative_error(sample(cached, cfg=0.0, positive=high, negative=low), alone) < TOLERANCE
    both = sample(cached, cfg=3.0, positive=high, negative=low)
    want = sample(apply(model, random_condition(), easy[0]), cfg=3.0, positive=high, negative=low)
    assert relative_error(both, want) < TOLERANCE


def test_guidance_that_differs_within_a_batch(model, easy) -> None:
    conditioned = apply(model, random_condition(), easy[0])
    evaluation = Hooks.evaluation
    rows = torch.tensor([1.0, 4.0])

    def per_row(self, flux, arguments, tag):
        arguments["guidance"] = rows
        return evaluation(self, flux, arguments, tag)

    with mock.patch.object(Hooks, "evaluation", per_row):
        both = kv_of(conditioned, batch=2)[0]
    for i, guidance in enumerate(rows.tolist()):
        alone = kv_of(conditioned, batch=2, positive=prompt(guidance=guidance))[0]
        row = [(k[i : i + 1], v[i : i + 1]) for k, v in both]
        want = [(k[i : i + 1], v[i : i + 1]) for k, v in alone]
        assert difference(row, want) < TOLERANCE


def test_weight_0_is_the_base_weights_branch(model, easy) -> None:
    """Not "no condition": the condition is still seen, through the model's own weights."""
    condition = random_condition(4, 4, placement="fit")
    zero = random_easycontrol_lora("easyzero.safetensors", scale=0.0)
    got = sample(apply(model, condition, easy[0], strength=0.0))
    assert torch.equal(got, sample(apply(model, condition, zero)))
    assert relative_error(got, sample(model)) > 0.01


def test_ranks_may_differ_between_blocks(model) -> None:
    """As if every matrix were filled up with zeros to the largest rank."""
    ranks = itertools.count(1)
    name = random_easycontrol_lora("easyranks.safetensors", rank=lambda: next(ranks))
    tensors = load_file(folder_paths.get_full_path("loras", name))
    shapes = {key: (0, 32 - v.shape[0]) if ".down." in key else (32 - v.shape[1], 0)
              for key, v in tensors.items()}  # fmt: skip
    filled = save_lora(
        "easyfilled.safetensors",
        {key: F.pad(v, (0, shapes[key][0], 0, shapes[key][1])) for key, v in tensors.items()},
    )
    assert len({v.shape for v in tensors.values()}) > 20
    got, want = (kv_of(apply(model, random_condition(), file))[0] for file in (name, filled))
    assert difference(got, want) < TOLERANCE


def test_ordinary_loras_act_on_the_condition_too(easy, omini) -> None:
    """As if its weights were the model's own; an OminiControl condition beside it is without."""
    ref = reference("dev_like")
    plain, style = ref.model(), ref.under("lora.style.")
    styled, _ = comfy.sd.load_lora_for_models(plain, None, style, 1.0, 1.0)
    styled.patch_model()
    weights = styled.model.diffusion_model.state_dict()
    merged = make_model(flux_config(True), {key: value.clone() for key, value in weights.items()})
    styled.unpatch_model()
    for lora, alike in ((easy[0], merged), (omini, plain)):
        got, want = (
            kv_of(apply(model, random_condition(), lora, attention="independent"))[0]
            for model in (styled, alike)
        )
        assert difference(got, want) < 1e-4
    assert relative_error(sample(styled), sample(plain)) > 0.01


def test_position_of_subjects_and_compact_conditions() -> None:
    """Subjects lie 64 rows down; a spatial token lies at its block's corner (original
    ``resize_position_encoding``)."""
    subject = random_condition(2, 3, placement="easycontrol_subject").positions((8, 8), False)
    assert subject.tolist() == [[64, 0], [64, 1], [64, 2], [65, 0], [65, 1], [65, 2]]
    spatial = random_condition(2, 3, placement="fit").positions((6, 12), False)
    assert spatial.tolist() == [[0, 0], [0, 4], [0, 8], [3, 0], [3, 4], [3, 8]]


def test_compact_subjects_stay_64_rows_down() -> None:
    full = random_condition(4, 4, placement="easycontrol_subject")
    assert compact(full, compression=0.5)[0].positions((8, 8), False).tolist() == [
        [64, 0], [64, 2], [66, 0], [66, 2]
    ]  # fmt: skip


def test_the_lora_leaves_the_device_once_nothing_needs_it(model, easy) -> None:
    """Theirs are 300 MB on FLUX.1; computed once, no step after the first needs them."""
    held = []
    block = Run.block

    def spy(run, number, original):
        held.append(run._sources[0].linears._linears is not None)
        return block(run, number, original)

    conditioned = apply(model, random_condition(), easy[0])
    with mock.patch.object(Run, "block", spy):
        sample(with_cache(conditioned), steps=3)
        blocks = len(held) // 3
        assert held == [True] * blocks + [False] * 2 * blocks
        held.clear()
        sample(conditioned, steps=3)
        assert all(held)


def test_room_for_the_lora_is_reserved(model, easy) -> None:
    """The host is asked for what K/V and LoRA take."""
    asked = []
    memory_required = type(model.model).memory_required

    def spy(base, shape, *args, **kwargs):
        asked.append(math.prod(shape[2:]))
        return memory_required(base, shape, *args, **kwargs)

    condition = random_condition()
    big = random_easycontrol_lora("easybig.safetensors", rank=8192)
    with mock.patch.object(type(model.model), "memory_required", spy):
        sample(apply(model, condition, easy[0]), steps=1)
        small_ask = max(asked)
        sample(apply(model, condition, big), steps=1)
    assert max(asked) > small_ask


# --- beside each other -------------------------------------------------------------------------

SIDE = st.integers(1, 6)
CONDITIONS = st.lists(
    st.tuples(
        st.sampled_from(["easy0", "easy1", "omini"]),
        SIDE,
        SIDE,
        st.sampled_from(["fit", "aligned", "easycontrol_subject", "right"]),
        st.sampled_from([0.5, 1.0]),
        st.sampled_from([0.4, 1.0]),
    ),
    min_size=2,
    max_size=4,
)


def add(model, easy, omini, seed, spec) -> ModelPatcher:
    family, h, w, placement, condition_scale, strength = spec
    return apply(
        model,
        random_condition(h, w, seed, placement=placement),
        omini if family == "omini" else easy[int(family[-1])],
        attention="independent" if family == "omini" else "auto",
        condition_scale=condition_scale,
        strength=strength,
    )


def chain(model, easy, omini, specs) -> ModelPatcher:
    for seed, spec in specs:
        model = add(model, easy, omini, seed, spec)
    return model


@settings(max_examples=12, deadline=None)
@given(CONDITIONS)
def test_each_has_the_same_kv_as_alone(model, easy, omini, specs) -> None:
    together = kv_of(chain(model, easy, omini, list(enumerate(specs))))
    for (seed, spec), got in zip(enumerate(specs), together, strict=True):
        (alone,) = kv_of(add(model, easy, omini, seed, spec))
        assert difference(got, alone) == 0


@settings(max_examples=12, deadline=None)
@given(CONDITIONS, st.randoms())
def test_order_and_cache_do_not_matter(model, easy, omini, specs, rng) -> None:
    specs = list(enumerate(specs))
    shuffled = specs[:]
    rng.shuffle(shuffled)
    first = chain(model, easy, omini, specs)
    a = sample(first, steps=2)
    # Not to the bit: computed once, conditions of one length are a batch.
    assert relative_error(sample(with_cache(first), steps=2), a) < TOLERANCE
    assert relative_error(sample(chain(model, easy, omini, shuffled), steps=2), a) < TOLERANCE


def test_beside_a_joint_condition_each_keeps_its_rules(model, easy, omini) -> None:
    """auto: EasyControl's once, exactly; OminiControl's, which drifts, every n steps."""
    one = apply(model, random_condition(4, 4, placement="fit"), easy[0])
    both = apply(one, random_condition(3, 3, 1, placement="right"), omini)
    with recorded_runs() as runs:
        sample(with_cache(both, refresh_every=2), steps=4)
    assert runs[0].branches_computed == 1 + 2
    assert difference(kv_of(both)[0], kv_of(one)[0]) == 0


# --- files -------------------------------------------------------------------------------------


def test_the_family_is_told_by_the_keys(model) -> None:
    ref = reference("easycontrol")
    assert family_of(ref.under("lora.e0.")) is EASYCONTROL
    assert family_of(reference("dev_like").under("lora.a.")) is OMINICONTROL
    conditioned = apply(model, random_condition(), ref.lora_file("e0"))
    assert get_setup(conditioned).branches[0].lora.family is EASYCONTROL
    assert not get_setup(conditioned).branches[0].joint


KEY = "transformer_blocks.0.attn.processor.{}_loras.{}.{}.weight"


@pytest.mark.parametrize(
    ("name", "changes", "pattern"),
    [
        (
            "two_conditions",
            {KEY.format("q", 1, "down"): (4, 32), KEY.format("q", 1, "up"): (32, 4)},
            "holds LoRAs for several conditions.*choose EasyControl's single-condition files",
        ),
        (
            "single_proj",
            {"single_transformer_blocks.0.attn.processor.proj_loras.0.down.weight": (4, 32)},
            "nothing in the model belongs to single_transformer_blocks.0.attn.processor.proj_loras",
        ),
        (
            "foreign_key",
            {"transformer_blocks.0.ff.processor.loras.0.down.weight": (4, 32)},
            "nothing in the model belongs to transformer_blocks.0.ff.*OminiControl or EasyControl",
        ),
        (
            "mixed_families",
            {"transformer.x_embedder.lora_A.weight": (4, 64)},
            "nothing in the model belongs to transformer.x_embedder.lora_A.weight",
        ),
        ("half", {KEY.format("proj", 0, "up"): None}, "only half of the LoRA for .*to_out.0"),
        ("other_size", {KEY.format("v", 0, "down"): (4, 3072)}, "another size: .*attn.to_v"),
    ],
)
def test_files_that_do_not_fit(model, name, changes, pattern) -> None:
    tensors = reference("easycontrol").under("lora.e0.")
    for key, shape in changes.items():
        tensors.pop(key, None)
        if shape is not None:
            tensors[key] = torch.zeros(shape)
    file = save_lora(f"easy_{name}.safetensors", tensors)
    with pytest.raises(Omini2Error, match=rf"^lora_name: {file} .*{pattern}.*\.$"):
        apply(model, random_condition(), file)


def test_joint_is_refused(model, easy) -> None:
    sentence = r"^attention: EasyControl's LoRAs were trained .* only themselves.*set attention to"
    with pytest.raises(Omini2Error, match=sentence):
        apply(model, random_condition(), easy[0], attention="joint")
    for attention in ("auto", "independent"):
        apply(model, random_condition(), easy[0], attention=attention)


@pytest.mark.parametrize("nested", [None, "state_dict"])
def test_pt_files_are_refused_with_how_to_convert(model, nested) -> None:
    """The command in the sentence does what it says."""
    tensors = reference("easycontrol").under("lora.e0.")
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors if nested is None else {nested: tensors, "epoch": 3}, folder / "canny.pt")
    folder_paths.filename_list_cache.clear()
    with pytest.raises(Omini2Error, match=r"^lora_name: canny.pt is not a .safetensors") as error:
        apply(model, random_condition(), "canny.pt")
    command = re.search(r"in Python with (d = .*\)) and choose", str(error.value))[1]
    program = f"import torch, safetensors.torch; {command}"
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)
    folder_paths.filename_list_cache.clear()
    apply(model, random_condition(), "canny.safetensors")

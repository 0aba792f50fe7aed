"""What each project's own code computes, through the nodes, with the family set or found."""

from contextlib import nullcontext

import comfy.sd
import nodes
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from helpers.original import TOLERANCE, packed
from tiny import (
    Case,
    Reference,
    apply,
    encode,
    pytorch_attention,
    record,
    reference,
    relative_error,
    sample,
    with_cache,
)

from omini2_extension.omini2_core.lora.family import NO_LORA

FILES = {
    "easystyle": "auto",
    "omniconsistency": "OmniConsistency",
    "ieap": "IEAP",
    "unicombine": "UniCombine",
    "unicombine_dev": "UniCombine",
    "omnipaint": "OmniPaint",
    "photodoodle": "PhotoDoodle",
}
CASES = [(file, name) for file in FILES for name in reference(file).meta["cases"]]
PLACEMENT = {"spatial": "fit", "subject": "easycontrol_subject"}


def build(ref: Reference, case: Case, family: str) -> ModelPatcher:
    """The graph of a case: stock Load LoRA for ordinary LoRAs, an Apply for each condition."""
    model = ref.model()
    ordinary = list(case.meta.get("main", []))
    if case.meta.get("style"):
        ordinary.append([case.meta["style"], 1.0])
    for name, weight in ordinary:
        lora = ref.under(f"lora.{name}.")
        model, _ = comfy.sd.load_lora_for_models(model, None, lora, weight, 0)
    for k, cond in enumerate(case.meta["conds"]):
        kind = cond.get("kind")
        condition = encode(
            case.tensors[f"cond{k}.latent"],
            placement=PLACEMENT[kind] if kind else "custom",
            delta=tuple(cond.get("delta", (0, 0))),
            position_scale=cond.get("scale", 1.0),
        )
        model = apply(
            model,
            condition,
            NO_LORA if cond["lora"] is None else ref.lora_file(cond["lora"]),
            strength=cond.get("weight", 1.0),
            condition_scale=case.meta.get("strength", 1.0),
            family=family,
        )
    return model


def family_of(file: str, case: Case) -> str:
    """IEAP's own code can leave the picture's side out, which is how OminiControl's runs."""
    return FILES[file] if case.meta.get("latent_lora", True) else "OminiControl"


@pytest.mark.compatibility("Hosts", "The numbers of the original code", "works", "")
@pytest.mark.parametrize(("file", "name"), CASES)
def test_velocity_is_the_originals(file: str, name: str) -> None:
    ref = reference(file)
    case = ref.case(name)
    model = build(ref, case, family_of(file, case))
    once = "pred_cached_once" in case.tensors
    want = case.tensors["pred_cached_once" if once else "pred_every_step"]
    got = packed(record(with_cache(model, "once") if once else model, case))
    assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("omnipaint", "insert"),
        ("photodoodle", "effect"),
        ("ieap", "left"),
        ("easystyle", "subject_style"),
    ],
)
def test_a_batch_is_each_picture_alone(file: str, name: str) -> None:
    ref = reference(file)
    case = ref.case(name)
    model = build(ref, case, FILES[file])
    tensors = dict(case.tensors)
    latents = [tensors["latent"], tensors["latent"].flip(-1)]
    noises = [tensors["noise"], tensors["noise"].flip(-2)]
    alone = [
        record(model, Case(case.meta, {**tensors, "latent": latent, "noise": noise}))
        for latent, noise in zip(latents, noises, strict=True)
    ]
    both = {"latent": torch.cat(latents), "noise": torch.cat(noises, 1)}
    together = record(model, Case(case.meta, {**tensors, **both}))
    assert relative_error(together, torch.cat(alone, 1)) < TOLERANCE
    assert relative_error(alone[0], alone[1]) > 0.1


def test_one_sequence_with_every_kernel() -> None:
    """Those that tell their log-sum-exp and those that don't; sizes and scales differ."""
    ref = reference("omnipaint")
    case = ref.case("insert")
    got = []
    for kernels in (nullcontext, pytorch_attention):
        for scale in (1.0, 0.6):
            case.meta["strength"] = scale
            with kernels():
                got.append(packed(record(build(ref, case, "OmniPaint"), case)))
    basic, scaled, pytorch, pytorch_scaled = got
    assert relative_error(pytorch, case.tensors["pred_every_step"]) < TOLERANCE
    assert relative_error(pytorch_scaled, scaled) < TOLERANCE < relative_error(scaled, basic)


def test_a_sequence_looks_at_what_is_kept_of_the_other() -> None:
    """One that comes in later is computed when it does, the other one's K/V being older."""
    ref = reference("omnipaint")
    case = ref.case("insert")
    file = ref.lora_file("insert")
    first, second = (case.tensors[f"cond{k}.latent"] for k in range(2))

    def graph(start: float, lora_family: str) -> ModelPatcher:
        model = apply(ref.model(), encode(first), file, family=lora_family)
        late = encode(second, placement="custom", delta=(0, -6))
        return apply(model, late, file, family=lora_family, start_percent=start)

    sampled = {
        (start, family): sample(with_cache(graph(start, family), "every_n_steps", 3), 8, 8, steps=6)
        for start in (0.0, 0.5)
        for family in ("OmniPaint", "UniCombine")  # the same but for the shared sequence
    }
    for start in (0.0, 0.5):
        together, apart = (sampled[start, family] for family in ("OmniPaint", "UniCombine"))
        assert torch.isfinite(together).all()
        assert relative_error(together, apart) > 1e-4
    assert relative_error(sampled[0.5, "OmniPaint"], sampled[0.0, "OmniPaint"]) > 1e-3


def test_the_pictures_side_is_what_load_lora_makes_of_it() -> None:
    """Bit for bit; a second condition beside it is without."""
    ref = reference("ieap")
    case = ref.case("aligned")
    condition = encode(case.tensors["cond0.latent"])
    by_hand, _ = comfy.sd.load_lora_for_models(ref.model(), None, ref.under("lora.s0."), 0.7, 0)
    own = apply(ref.model(), condition, ref.lora_file("s0"), strength=0.7, family="IEAP")
    other = apply(by_hand, condition, ref.lora_file("s0"), strength=0.7, family="OminiControl")
    assert torch.equal(record(own, case), record(other, case))
    none = apply(ref.model(), condition, ref.lora_file("s0"), strength=0.0, family="IEAP")
    assert not none.patches


@pytest.mark.parametrize("before", [True, False])
def test_the_pictures_lora_loaded_besides_is_said(before: bool, caplog) -> None:
    """As graphs have it that were made before there was a family."""
    ref = reference("ieap")
    case = ref.case("aligned")
    condition, file = encode(case.tensors["cond0.latent"]), ref.lora_file("s0")

    def load(model: ModelPatcher) -> ModelPatcher:
        found: ModelPatcher = nodes.LoraLoaderModelOnly().load_lora_model_only(model, file, 1.0)[0]
        return found

    alone = apply(ref.model(), condition, file, family="IEAP")
    other = ref.lora_file("s1")
    record(nodes.LoraLoaderModelOnly().load_lora_model_only(alone, other, 1.0)[0], case)
    assert not caplog.records
    model = load(ref.model()) if before else ref.model()
    model = apply(model, condition, file, family="IEAP")
    record(model if before else load(model), case)
    assert "is loaded with Load LoRA as well, so it acts on the picture twice" in caplog.text


def test_the_steps_time_is_the_pictures() -> None:
    """At another step a condition has other K/V, at time 0 the same."""
    ref = reference("photodoodle")
    case = ref.case("no_lora")
    condition = encode(case.tensors["cond0.latent"])
    model = apply(ref.model(), condition, NO_LORA, family="PhotoDoodle")
    every, once = (record(with_cache(model, reuse), case) for reuse in ("off", "once"))
    assert torch.equal(every[0], once[0])
    assert relative_error(once[1], every[1]) > 1e-3

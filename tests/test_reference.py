"""What the original code computes, through the nodes and the host's own sampling path."""

import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from tiny import Case, Reference, apply, encode, record, reference, relative_error, with_cache

from omini2_extension.omini2_core.tokens.condition import pack

TOLERANCE = 1e-5
FILES = ("dev_like", "schnell_like")
CASES = [
    (file, name, mode)
    for file in FILES
    for name, meta in reference(file).meta["cases"].items()
    for mode in ("every_step", "cached_once")
    if not meta.get("integrate") and (meta["conds"] or mode == "every_step")
]


def build(ref: Reference, case: Case, **options: object) -> ModelPatcher:
    """The graph of a case: one Condition Encode and one Apply per condition."""
    model = ref.model()
    if "main" in case.meta:
        style = {key: value for key, value in ref.under(f"lora.{case.meta['main']}.").items()}
        model, _ = comfy.sd.load_lora_for_models(model, None, style, 1.0, 1.0)
    for k, cond in enumerate(case.meta["conds"]):
        condition = encode(
            case.tensors[f"cond{k}.latent"],
            placement="custom" if "delta" in cond else "aligned",
            delta=tuple(cond.get("delta", (0, 0))),
            position_scale=cond.get("scale", 1.0),
            keep=case.tensors.get(f"cond{k}.keep"),
        )
        model = apply(
            model,
            condition,
            ref.lora_file(cond["lora"]),
            condition_scale=case.meta.get("strength", 1.0),
            attention="independent" if case.meta.get("independent") else "joint",
            **options,
        )
    return model


def packed(velocities: torch.Tensor) -> torch.Tensor:
    return torch.stack([pack(v) for v in velocities])


@pytest.mark.compatibility("Hosts", "The numbers of the original code", "works", "")
@pytest.mark.parametrize(("file", "name", "mode"), CASES)
def test_velocity_is_the_originals(file: str, name: str, mode: str) -> None:
    ref = reference(file)
    case = ref.case(name)
    model = build(ref, case)
    if mode == "cached_once":
        model = with_cache(model, "once")
    error = relative_error(packed(record(model, case)), case.tensors[f"pred_{mode}"])
    assert error < TOLERANCE

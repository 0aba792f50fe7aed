"""The cases of what the original code computes, as graphs of nodes."""

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from tiny import (
    Case,
    Reference,
    apply,
    encode,
    flux_config,
    make_model,
    record,
    recorded_runs,
    reference,
    relative_error,
    with_cache,
)

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
CONDITIONED = [
    (file, name)
    for file, name in sorted({case[:2] for case in CASES})
    for meta in [reference(file).meta["cases"][name]]
    if meta["conds"] and meta.get("strength") != 0
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


def fp8_errors() -> tuple[float, float]:
    """For the benchmark: the largest error over the reference cases, and bytes over bf16's."""
    errors = [fp8_error(file, name) for file, name in CONDITIONED]
    return max(error for error, _ in errors), max(ratio for _, ratio in errors)


def fp8_error(file: str, name: str) -> tuple[float, float]:
    """The velocity's error against K/V in bf16, and the bytes over theirs."""
    ref = reference(file)
    case = ref.case(name)
    model = build(ref, case)
    weights = model.model.diffusion_model.state_dict()
    half = make_model(flux_config(ref.meta["guidance_embeds"]), weights, torch.bfloat16)
    half.model_options, half.wrappers = model.model_options, model.wrappers
    half.patches = model.patches
    with recorded_runs() as runs:
        velocities = [
            packed(record(with_cache(half, "once", storage=storage), case))
            for storage in ("model", "fp8")
        ]
    assert runs[1].storage == "fp8"
    error = relative_error(velocities[1].float(), velocities[0].float())
    return error, runs[1].kv_bytes / runs[0].kv_bytes

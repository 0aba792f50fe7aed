"""What is patched onto the layers that a condition passes, and what follows from it.

The one judge of it: for what a branch takes off again, for the warnings, for what may be kept
between runs, and for what a file of K/V can fit.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from comfy.model_patcher import ModelPatcher

from ..cache.between_runs import Identity
from ..errors import Omini2Error, warn
from ..lora.deltas import Delta, Deltas


@dataclass(frozen=True)
class Patched:
    """The verdict.

    Attributes:
        taken_off: what LoRAs loaded the ordinary way add to the model's weights. They are meant
            for text and picture only, but conditions go through the same weights; so each branch
            takes them off again, on its activations.
        stays: what else changes the conditions too, in words.
        identity: names the weights that a run computes with, beside the model; None where they
            can't be named, so that nothing may be kept between runs.
        tellable: whether a file can say what weights its K/V were computed with.
    """

    taken_off: Deltas
    stays: frozenset[str]
    identity: Hashable | None
    tellable: bool

    def warn(self) -> None:
        """Says what changes the conditions although it is meant for text and picture."""
        if self.stays:
            warn(
                f"model: a LoRA of type {', '.join(sorted(self.stays))} changes the conditions "
                "too; only plain LoRAs can be kept to text and picture, so check the result or "
                "leave it out."
            )


def judge(model: ModelPatcher) -> Patched:
    """What is patched onto a model.

    Patches of other kinds than LoRA (merged models above all) are the model.

    Raises:
        Omini2Error: a control LoRA, which changes what the model's first layer takes.
    """
    taken_off: Deltas = {}
    stays: set[str] = set()
    for key, patches in model.patches.items():
        deltas = _plain_deltas(patches, stays)
        if deltas:
            taken_off[key.removeprefix("diffusion_model.").removesuffix(".weight")] = deltas
    if model.hook_patches:
        stays.add("hook")
    return Patched(taken_off, frozenset(stays), _identity(model), _tellable(model))


def _plain_deltas(patches: Iterable[tuple[Any, ...]], stays: set[str]) -> list[Delta]:
    """What plain LoRAs add to one weight; names the others in ``stays``."""
    deltas: list[Delta] = []
    for strength, patch, strength_model, offset, function, *_ in patches:
        if strength_model != 1.0:
            deltas = [replace(d, scale=d.scale * strength_model) for d in deltas]
        name = getattr(patch, "name", None)
        if name is None:
            continue
        if name != "lora" or function is not None:
            stays.add(name)
            continue
        up, down, alpha, mid, dora_scale, reshape = patch.weights
        if reshape is not None:
            raise Omini2Error(
                "model: a control LoRA gives this FLUX.1 extra picture channels, which conditions "
                "have none of; take it out of the graph."
            )
        if mid is not None or dora_scale is not None:
            stays.add("lora with mid weights" if dora_scale is None else "dora")
            continue
        scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
        start = 0 if offset is None else offset[1]
        deltas.append(Delta(start, down.flatten(1), up.flatten(1), scale))
    return deltas


def _identity(model: ModelPatcher) -> Hashable | None:
    """Patches have an id in the host that changes with them. What replaces parts of the model is
    told apart as objects. Hooks and injections change weights in ways of their own.
    """
    if model.hook_patches or model.injections or model.weight_wrapper_patches:
        return None
    replaced = sorted(
        (key, value) for key, value in model.object_patches.items() if key != "model_sampling"
    )
    return model.patches_uuid, tuple((key, Identity(value)) for key, value in replaced)


def _tellable(model: ModelPatcher) -> bool:
    replaced = set(model.object_patches) - {"model_sampling"}
    patches = (patch for patches in model.patches.values() for patch in patches)
    return not model.hook_patches and not replaced and all(map(_is_lora, patches))


def _is_lora(patch: tuple[Any, ...]) -> bool:
    _, adapter, strength_model, _, function, *_ = patch
    plain = getattr(adapter, "name", None) == "lora" and strength_model == 1.0
    return plain and function is None

"""What is patched onto the layers that a condition passes, and what follows from it.

The one judge of it: for what a branch takes off again, for the warnings, for what may be kept
between runs, and for what a file of K/V can fit. It goes by layer and by what a patch does there:
what touches text layers or the last layer only is none of a condition's business.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter

from ..cache.between_runs import Identity
from ..errors import Omini2Error, warn
from ..flux1.blocks import Rows
from ..flux1.model import Flux1
from ..lora.deltas import Delta, Deltas, outputs_of
from .kernels import own_forward
from .model import flux1

PREFIX = "diffusion_model."
# What a patch that isn't one of the host's adapters does, by its name.
PLAIN_PATCHES = {
    "diff": "diff (a full difference)",
    "set": "set_weight (other weights)",
    "model_as_lora": "a model as a LoRA",
}
# One of the host's patches: strength, what, strength of the weight so far, (dimension, first,
# how many), function.
Patch = tuple[Any, ...]


@dataclass
class Patched:
    """The verdict.

    Attributes:
        taken_off: what LoRAs loaded the ordinary way add to the model's weights. They are meant
            for text and picture only, but conditions go through the same weights; so each branch
            takes them off again, on its activations.
        stays: what else changes the conditions too, in words.
        merged: whether the model's own weights are mixed with others'.
        identity: names the weights that a run computes with, beside the model; None where they
            can't be named, so that nothing may be kept between runs.
    """

    identity: Hashable | None
    taken_off: Deltas = field(default_factory=dict)
    stays: set[str] = field(default_factory=set)
    merged: bool = False

    @property
    def tellable(self) -> bool:
        """Whether a file can say what weights its K/V were computed with."""
        return not self.stays and not self.merged


def warn_of(stays: Iterable[str]) -> None:
    """Says what changes the conditions although it is meant for text and picture."""
    if stays:
        warn(
            f"model: a LoRA of type {', '.join(sorted(stays))} changes the conditions too; only "
            "plain LoRAs can be kept to text and picture, so check the result or leave it out."
        )


def judge(model: ModelPatcher) -> Patched:
    """What is patched onto a model, as far as it reaches conditions.

    Raises:
        Omini2Error: a control LoRA, which changes what the model's first layer takes.
    """
    found = Patched(weights_identity(model))
    passed = flux1(model).passed
    for key, patches in model.patches.items():
        layer = _layer(key, passed)
        if layer is not None:
            deltas = _Deltas(found, layer, passed[layer], key).after(patches)
            if deltas:
                found.taken_off[layer] = deltas
    if any(_layer(key, passed) for keys in model.hook_patches.values() for key in keys):
        found.stays.add("hook")
    if any(_layer(key, passed) for key in model.weight_wrapper_patches):
        found.stays.add("weight wrapper")
    replaced = (key.removeprefix(PREFIX) for key in model.object_patches)
    found.merged |= any(_touches(path, passed) for path in replaced)
    return found


def put_on_picture(model: ModelPatcher, deltas: Deltas, strength: float) -> None:
    """Patches a condition's LoRA onto the model's weights, as Load LoRA does."""
    patches = {
        (f"{PREFIX}{path}.weight", (0, delta.start, len(delta.up))): LoRAAdapter(
            set(), (delta.up, delta.down, delta.scale * len(delta.down), None, None, None)
        )
        for path, each in deltas.items()
        for delta in each
    }
    model.add_patches(patches, strength)


def acts_twice(model: ModelPatcher, deltas: Deltas) -> bool:
    """Whether a LoRA that is put on the picture has been loaded with Load LoRA besides."""
    for path, each in list(deltas.items())[:1]:
        found = [what for _, what, *_ in model.patches.get(f"{PREFIX}{path}.weight", ())]
        plain = [what.weights for what in found if getattr(what, "name", None) == "lora"]
        return any(sum(_same(weights, delta) for weights in plain) > 1 for delta in each)
    return False


def _same(weights: Any, delta: Delta) -> bool:
    up, down = weights[:2]
    return (
        up.shape == delta.up.shape and torch.equal(up, delta.up) and torch.equal(down, delta.down)
    )


def replaced_calls(flux: Flux1) -> set[str]:
    """What changes the layers' own calls, in words; it shows only while the model is in use.

    The host's bypass LoRAs are none: conditions go past them.
    """
    for path in flux.passed:
        module = flux.module.get_submodule(path)
        forward = own_forward(module) or vars(module).get("forward")
        if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
            return {f"{type(module).__name__} with another forward"}
    return set()


def _layer(key: str, passed: Mapping[str, Rows | None]) -> str | None:
    """The layer that a weight's key belongs to, if a condition passes it."""
    layer = key.removeprefix(PREFIX).rpartition(".")[0]
    return layer if layer in passed else None


def _touches(path: str, passed: Mapping[str, Rows | None]) -> bool:
    """Whether a part of the model holds a layer that a condition passes, or lies in one."""
    whole = path in ("", "diffusion_model")
    return whole or any(f"{each}.".startswith(f"{path}.") for each in passed)


class _Deltas:
    """What plain LoRAs add to one weight; what else changes it goes into the verdict."""

    def __init__(self, found: Patched, layer: str, rows: Rows | None, key: str) -> None:
        self._found = found
        self._layer = layer
        self._rows = rows
        # Hosts call a norm's scale `scale` or `weight`.
        self._is_weight = key.endswith(f"{layer}.weight") and not layer.endswith("_norm")

    def after(self, patches: Iterable[Patch]) -> list[Delta]:
        """Patches one after the other, each on what the ones before have made."""
        deltas: list[Delta] = []
        for strength, what, strength_model, offset, function, *_ in patches:
            if not self._matters(offset):
                continue
            if isinstance(what, list):
                self._found.merged = True
            region = None if offset is None else (offset[1], offset[1] + offset[2])
            kind = _kind_of(what)
            if kind == "set":
                strength_model, strength = 0.0, 1.0
            if strength_model != 1.0:
                deltas = _scaled(deltas, region, strength_model)
                self._found.merged |= kind != "set"
            if strength == 0.0:
                continue
            if isinstance(what, list):
                inner = self.after(what[1:])
                deltas += [_moved(delta, strength, offset) for delta in inner]
            elif self._is_plain_lora(what, offset, function):
                deltas.append(_delta(what, strength, offset))
            else:
                self._found.stays.add(self._name(what, kind))
        return deltas

    def _matters(self, offset: Any) -> bool:
        """Whether a patch reaches the outputs that a condition gets of this layer."""
        if self._rows is None or offset is None or offset[0] != 0:
            return True
        start, stop = self._rows
        return bool(offset[1] < stop and offset[1] + offset[2] > start)

    def _is_plain_lora(self, what: Any, offset: Any, function: Any) -> bool:
        if getattr(what, "name", None) != "lora" or function is not None or not self._is_weight:
            return False
        _, _, _, mid, dora_scale, reshape = what.weights
        if reshape is not None:
            raise Omini2Error(
                "model: a control LoRA gives this FLUX.1 extra picture channels, which conditions "
                "have none of; take it out of the graph."
            )
        by_rows = offset is None or offset[0] == 0
        return by_rows and mid is None and dora_scale is None

    def _name(self, what: Any, kind: str) -> str:
        if kind == "lora" and self._is_weight:
            mid, dora_scale = what.weights[3:5]
            kind = "dora" if dora_scale is not None else kind
            kind = "lora with mid weights" if mid is not None else kind
        return kind if self._is_weight else f"{kind} on a bias or a norm"


def _kind_of(what: Any) -> str:
    """What a patch is called."""
    name = getattr(what, "name", None)
    if name is not None:
        return str(name)
    if isinstance(what, tuple) and len(what) == 2 and what[0] == "set":
        return "set"
    plain = what[0] if isinstance(what, tuple) and len(what) == 2 else "diff"
    return PLAIN_PATCHES.get(plain, str(plain)) if isinstance(plain, str) else PLAIN_PATCHES["diff"]


def _delta(adapter: Any, strength: float, offset: Any) -> Delta:
    up, down, alpha, *_ = adapter.weights
    scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
    return Delta(0 if offset is None else offset[1], down.flatten(1), up.flatten(1), scale)


def _moved(delta: Delta, strength: float, offset: Any) -> Delta:
    """A delta of another model's weight, which is mixed in with a strength at an offset."""
    start = delta.start + (0 if offset is None else offset[1])
    return replace(delta, start=start, scale=delta.scale * strength)


def _scaled(deltas: list[Delta], region: Rows | None, factor: float) -> list[Delta]:
    """Deltas times a factor in a region of the outputs, and as they are elsewhere."""
    if region is None:
        return [replace(d, scale=d.scale * factor) for d in deltas if factor]
    first, last = region
    end = max((d.start + d.up.shape[0] for d in deltas), default=0)
    within = outputs_of(deltas, first, last) if factor else []
    behind = outputs_of(deltas, last, max(end, last))
    return [
        *outputs_of(deltas, 0, first),
        *(replace(d, start=d.start + first, scale=d.scale * factor) for d in within),
        *(replace(d, start=d.start + last) for d in behind),
    ]


def weights_identity(model: ModelPatcher) -> Hashable | None:
    """Patches have an id in the host that changes with them. What replaces parts of the model is
    told apart as objects. Hooks and injections change weights in ways of their own.
    """
    if model.hook_patches or model.injections or model.weight_wrapper_patches:
        return None
    replaced = sorted(
        (key, value) for key, value in model.object_patches.items() if key != "model_sampling"
    )
    return model.patches_uuid, tuple((key, Identity(value)) for key, value in replaced)

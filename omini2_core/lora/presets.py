"""Which usage a LoRA file has: what it says itself, else the published one of its name.

The table is ``presets.json``, which nodes, the editor and the docs read. Published files say
nothing of themselves, so they go by their name within the family that their keys give away.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from ..tokens.condition import MAX_DELTA, MAX_SCALE, MIN_SCALE, PLACEMENTS, TOKEN_PIXELS, Placement
from .family import FAMILIES, LoraFamily, family_of
from .usage import Base, Pair, Sampling, Usage

TABLE = Path(__file__).with_name("presets.json")
# Where a condition LoRA acts, in diffusers' names.
LAYERS = ("transformer_blocks.", "single_transformer_blocks.", "x_embedder")
PREFIX = "omini2."
MAX_SIDE = 1 << 14  # pixels
LENGTH = 200  # letters; the trainer writes no longer value


def usage_of(lora_name: str, family: LoraFamily, metadata: Mapping[str, str]) -> Usage | None:
    """What a file's metadata or, where that says nothing, the table says; None if neither does."""
    return of_file(lora_name, family, metadata) or find(lora_name, family)


@cache
def published() -> tuple[Usage, ...]:
    """The table."""
    usages = []
    for group in json.loads(TABLE.read_text(encoding="utf-8")):
        group["sampling"] = {base: Sampling(**given) for base, given in group["sampling"].items()}
        group["source"] = f"{group['source']}, {group.pop('folder')}"
        group["delta"] = tuple(group.get("delta", (0, 0)))
        files = group.pop("files").items()
        usages += [Usage(file=file, shows=shows, **group) for file, shows in files]
    return tuple(usages)


def find(lora_name: str, family: LoraFamily) -> Usage | None:
    """The published LoRA that a file of this family is by its name, in whatever folder.

    A family's name may stand before it, as in ``easycontrol_canny.safetensors``.
    """
    stem = PurePosixPath(lora_name.replace("\\", "/")).stem.lower()
    stem = stem.removeprefix(f"{family.name.lower()}_").removeprefix(f"{family.name.lower()}-")
    known = (u for u in published() if u.family == family.name and u.file.lower() == stem)
    return next(known, None)


def of_file(lora_name: str, family: LoraFamily, metadata: Mapping[str, str]) -> Usage | None:
    """What a file of this project's trainer says of itself; None where that is nothing.

    Whatever isn't as the trainer writes it counts as not said.
    """
    said = {
        key.removeprefix(PREFIX): value
        for key, value in metadata.items()
        if key.startswith(PREFIX) and len(value) <= LENGTH
    }
    independent = _flag(said.get("independent_condition"))
    integration = _flag(said.get("integration"))
    delta = _pair(_numbers(said.get("position_delta"), ",", -MAX_DELTA, MAX_DELTA))
    scales = _numbers(said.get("position_scale"), ",", MIN_SCALE, MAX_SCALE)
    scale = _pair(scales if scales is None or len(scales) == 2 else scales * 2)
    size = _pair(_numbers(said.get("condition_size"), "x", 1, MAX_SIDE))
    if "," in said.get("compression", ""):  # trained at several sizes, any of which will do
        scale = size = None
    if (independent, integration, delta, scale, size) == (None,) * 5:
        return None
    sides = _numbers(said.get("target_size"), "x", 1, MAX_SIDE)
    shares = _numbers(said.get("compression", "1"), ",", MIN_SCALE, 1 / MIN_SCALE)
    nodes: dict[str, Any] = {}
    if delta is not None and sides is not None and shares is not None:
        # Trained at several sizes, it is described by the largest.
        target, compression = int(max(sides)), shares[0]
        nodes = _placed(delta, compression, round(target * compression / TOKEN_PIXELS))
        nodes |= {"size": target, "picture": target, "compression": compression}
        if scale is not None:
            nodes["position_scale"] = round(scale[0] * compression, 3)
    return Usage(
        file=lora_name,
        family=family.name,
        attention=None if independent is None else "independent" if independent else "joint",
        token_integration=integration,
        trained_at=None if delta is None or scale is None else Placement("custom", delta, scale),
        trained_size=None if size is None else (int(size[0]), int(size[1])),
        sampling=_sampling(said.get("base_model", "")),
        **nodes,
    )


def _placed(delta: Pair, compression: float, side: int) -> dict[str, Any]:
    """The node's placement and delta that move a square condition of ``side`` tokens by delta."""
    for kind in PLACEMENTS:
        if kind not in ("fit", "custom") and Placement(kind).delta_for((side, side)) == delta:
            return {"placement": kind}
    whole = round(delta[0] / compression), round(delta[1] / compression)
    return {"placement": "custom", "delta": whole}


def _sampling(model: str) -> dict[Base, Sampling]:
    """As a trained LoRA's base model is sampled with OminiControl's own LoRAs."""
    if model == "demo":
        return {"demo": Sampling(12, 3.5)}
    base: Base = "schnell" if "schnell" in model.lower() else "dev"
    return {base: published()[0].sampling[base]}


def _flag(text: str | None) -> bool | None:
    return None if text is None else text.lower() in ("true", "1")


def _numbers(text: str | None, separator: str, low: float, high: float) -> tuple[float, ...] | None:
    """A list of numbers; None if it is none, or one is out of bounds or NaN."""
    try:
        values = () if text is None else tuple(float(part) for part in text.split(separator))
    except ValueError:
        return None
    return values if values and all(low <= value <= high for value in values) else None


def _pair(values: tuple[float, ...] | None) -> Pair | None:
    return None if values is None or len(values) != 2 else (values[0], values[1])


def answer(
    lora_name: str, keys: Iterable[str], metadata: Mapping[str, str], base: str | None = None
) -> dict[str, Any]:
    """What the editor is told of a file; :mod:`..host.routes` says what each entry is for."""
    keys = list(keys)
    family = family_of(keys)
    if not keys:
        return _unknown(f"{lora_name} can't be read as a safetensors file; download it again.")
    named = [family.parse(key) for key in keys]
    if not all(name and name.module.startswith(LAYERS) for name in named):
        return _unknown(
            f"{lora_name} doesn't look like a condition LoRA. If it is an ordinary LoRA, load it "
            f"with Load LoRA; condition LoRAs are {_families()}'s and those that Omini2 Train LoRA "
            "makes."
        )
    own = of_file(lora_name, family, metadata)
    usage = own if own is not None and own.complete else find(lora_name, family)
    if usage is None:
        alone = own is not None and own.attention == "independent"
        attention = "independent" if alone else family.attention[0]
        return _unknown(
            f"{lora_name} is none of the published condition LoRAs and doesn't say how it was "
            f"trained. It runs as {family.name}'s do: {attention}, with the placement and image "
            "size that you set; ask its author for both."
        )
    return {
        "known": True,
        "title": usage.title,
        "values": usage.values(base),
        "bases": list(usage.sampling),
        "note": usage.note,
    }


def _unknown(note: str) -> dict[str, Any]:
    return {"known": False, "title": "", "values": {}, "bases": [], "note": note}


def _families() -> str:
    return " or ".join(family.name for family in FAMILIES)

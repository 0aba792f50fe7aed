"""The published condition LoRAs and how each is used, and what a trained file says of itself.

The table is ``presets.json``, which nodes, the editor and the docs read. Published files say
nothing of themselves, so they go by their name.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from ..tokens.condition import MAX_DELTA, MAX_SCALE, MIN_SCALE, PLACEMENTS, TOKEN_PIXELS, Placement
from .family import LoraFamily
from .usage import Base, Pair, Place, Sampling, Usage

TABLE = Path(__file__).with_name("presets.json")
PREFIX = "omini2."
MAX_SIDE = 1 << 14  # pixels
LENGTH = 200  # letters; the trainer writes no longer value


@cache
def published() -> tuple[Usage, ...]:
    """The table."""
    usages = []
    for group in json.loads(TABLE.read_text(encoding="utf-8")):
        group["sampling"] = {base: Sampling(**given) for base, given in group["sampling"].items()}
        group["source"] = ", ".join(filter(None, (group["source"], group.pop("folder"))))
        group["delta"] = tuple(group.get("delta", (0, 0)))
        if "second" in group:
            second = group["second"]
            group["second"] = Place(second["placement"], tuple(second["delta"]), second["size"])
        group["ordinary"] = tuple(group.get("ordinary", ()))
        files = group.pop("files").items()
        usages += [Usage(file=file, shows=shows, **group) for file, shows in files]
    return tuple(usages)


def named(lora_name: str) -> list[Usage]:
    """The published LoRAs that a file can be by its name.

    A family's name may stand before a file's, as in ``easycontrol_canny.safetensors``. Where
    several have the same name, those count whose family, repository or folder is in the path.
    """
    stem, folders = _stem(lora_name), _folders(lora_name)
    alike = [usage for usage in published() if stem in _names(usage)]

    def told(usage: Usage) -> bool:
        return stem != _plain(usage.file) or bool(folders & _places(usage))

    return [usage for usage in alike if told(usage)] or alike


def find(lora_name: str, family: LoraFamily) -> Usage | None:
    """The published LoRA of a family that a file is by its name, in whatever folder."""
    known = (u for u in published() if u.family == family.name and _stem(lora_name) in _names(u))
    return next(known, None)


def ordinary(lora_name: str) -> Usage | None:
    """Beside which published condition LoRA a file goes through Load LoRA, by its name."""
    words = {_stem(lora_name), *_folders(lora_name)}
    return next((usage for usage in published() if words & set(usage.ordinary)), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def _path(lora_name: str) -> PurePosixPath:
    return PurePosixPath(lora_name.replace("\\", "/"))


def _stem(lora_name: str) -> str:
    return _plain(_path(lora_name).stem)


def _folders(lora_name: str) -> set[str]:
    return {_plain(part) for part in _path(lora_name).parts[:-1]}


def _names(usage: Usage) -> tuple[str, str]:
    """What a published file may be called; the second leaves no doubt of its family."""
    file = _plain(usage.file)
    return file, f"{_plain(usage.family)}_{file}"


def _places(usage: Usage) -> set[str]:
    """Names of folders that tell whose a file is."""
    repository, _, folder = usage.source.partition(", ")
    return {_plain(name) for name in (usage.family, *repository.split("/"), folder) if name}


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

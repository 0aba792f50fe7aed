"""What a condition LoRA is used with: of the published ones by name, of trained ones by their file.

The table is ``presets.json``, which nodes, the editor and the docs read. Its files say nothing of
themselves, so they go by their name within the family that their keys give away.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ..errors import warn
from ..tokens.condition import MIN_SCALE, PLACEMENTS, TOKEN_PIXELS, Condition, Placement
from .family import FAMILIES, LoraFamily, chosen_placement, family_of
from .file import BranchLora
from .recipe import MAX_SIDE, Recipe, numbers, said_in

TABLE = Path(__file__).with_name("presets.json")
# Where a condition LoRA acts, in diffusers' names.
LAYERS = ("transformer_blocks.", "single_transformer_blocks.", "x_embedder")
Base = Literal["dev", "schnell", "demo"]
Values = dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Sampling:
    """How a base model is sampled; no guidance where it has no guidance embedder."""

    steps: int
    guidance: float | None = None
    image_guidance_scale: float = 1.0


DEFAULT_SAMPLING: dict[Base, Sampling] = {
    "dev": Sampling(28, 3.5),
    "schnell": Sampling(8),
    "demo": Sampling(12, 3.5),
}


@dataclass(frozen=True)
class Preset:
    """Settings for one condition LoRA.

    Attributes:
        file: its name without ``.safetensors``.
        shows: what its condition is.
        source: the repository that it is published in, and the folder there.
        place: the node's placement with its delta (rows, columns), for an image of ``size``.
        resize: how the node brings an image to ``size``.
        size: side of the condition in pixels, before any compression.
        picture: side of the picture that it was shown with, in pixels.
        compression: what Compact Tokens is set to.
        sampling: by base model, the recommended one first.
        prompt: what the prompt says.
    """

    file: str
    shows: str
    family: str
    source: str
    attention: str
    placement: str
    size: int
    picture: int
    sampling: Mapping[Base, Sampling]
    delta: tuple[int, int] = (0, 0)
    position_scale: float = 1.0
    resize: str = "off"
    compression: float = 1.0
    token_integration: bool = False
    prompt: str = ""

    @property
    def title(self) -> str:
        """What people call it."""
        return f"{self.family} {self.file}: {self.shows}" if self.source else self.file

    def values(self, base: str | None = None) -> Values:
        """Widgets' names -> values, for a base model; the recommended one if it isn't known."""
        sampling = self.sampling.get(base) or next(iter(self.sampling.values()))  # type: ignore[call-overload]
        return {
            "placement": self.placement,
            "delta_rows": self.delta[0],
            "delta_cols": self.delta[1],
            "position_scale": self.position_scale,
            "resize": self.resize,
            "size": self.size,
            "attention": self.attention,
            "compression": self.compression,
            "token_integration": self.token_integration,
            "width": self.picture,
            "height": self.picture,
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "image_guidance_scale": sampling.image_guidance_scale,
        }

    def warn_about(self, condition: Condition, attention: str) -> None:
        """Says what of a user's settings isn't what a published LoRA is meant for."""
        name = f"{self.family}'s {self.file}"
        Recipe(independent=self.attention == "independent").warn_about(name, condition, attention)
        place = condition.placement
        wanted = chosen_placement(self.placement, self.delta, (1.0, 1.0))
        if wanted.kind != "custom":
            wanted = replace(wanted, scale=place.scale)
        if _moved(place, condition.hw) != _moved(wanted, condition.hw):
            words = self.placement
            if words == "custom":
                words += f" with delta_rows {self.delta[0]} and delta_cols {self.delta[1]}"
            warn(
                f"placement: {name} was trained with placement {words}, but this condition lies "
                f"elsewhere ({place.kind}); set placement to {words} in Omini2 Condition Encode."
            )


def _moved(place: Placement, hw: tuple[int, int]) -> tuple[float, ...]:
    """Rows and columns of the picture by which a condition is moved."""
    return tuple(round(d * s, 2) for d, s in zip(place.delta_for(hw), place.scale, strict=True))


@cache
def published() -> tuple[Preset, ...]:
    """The table."""
    presets = []
    for group in json.loads(TABLE.read_text(encoding="utf-8")):
        sampling = {base: Sampling(**given) for base, given in group.pop("sampling").items()}
        source = f"{group.pop('source')}, {group.pop('folder')}"
        delta = tuple(group.pop("delta", (0, 0)))
        for file, shows in group.pop("files").items():
            presets.append(
                Preset(
                    file=file, shows=shows, source=source, sampling=sampling, delta=delta, **group
                )
            )
    return tuple(presets)


def find(lora_name: str, family: LoraFamily) -> Preset | None:
    """The published LoRA that a file of this family is by its name, in whatever folder.

    A family's name may stand before it, as in ``easycontrol_canny.safetensors``.
    """
    stem = PurePosixPath(lora_name.replace("\\", "/")).stem.lower()
    stem = stem.removeprefix(f"{family.name.lower()}_").removeprefix(f"{family.name.lower()}-")
    known = (p for p in published() if p.family == family.name and p.file.lower() == stem)
    return next(known, None)


def trained(lora_name: str, family: LoraFamily, metadata: Mapping[str, str]) -> Preset | None:
    """What a file of this project's trainer says of itself; None where it says too little."""
    recipe = Recipe.of(metadata)
    said = said_in(metadata)
    sides = numbers(said.get("target_size"), "x", 1, MAX_SIDE)
    shares = numbers(said.get("compression", "1"), ",", MIN_SCALE, 1 / MIN_SCALE)
    if recipe.independent is None or recipe.delta is None or sides is None or shares is None:
        return None
    # Trained at several sizes, it is described by the largest.
    target, compression = int(max(sides)), shares[0]
    placement = _named(recipe.delta, round(target * compression / TOKEN_PIXELS))
    delta = round(recipe.delta[0] / compression), round(recipe.delta[1] / compression)
    base = _base(said.get("base_model", ""))
    return Preset(
        file=PurePosixPath(lora_name.replace("\\", "/")).stem,
        shows=said.get("condition_type", ""),
        family=family.name,
        source="",
        attention="independent" if recipe.independent else "joint",
        placement=placement,
        delta=delta if placement == "custom" else (0, 0),
        position_scale=1.0 if recipe.scale is None else round(recipe.scale[0] * compression, 3),
        size=target,
        picture=target,
        compression=compression,
        token_integration=bool(recipe.integration),
        sampling={base: DEFAULT_SAMPLING[base]},
    )


def _named(delta: tuple[float, float], side: int) -> str:
    """The placement that moves a square condition of ``side`` tokens by delta."""
    for kind in PLACEMENTS:
        if kind not in ("fit", "custom") and Placement(kind).delta_for((side, side)) == delta:
            return kind
    return "custom"


def _base(model: str) -> Base:
    if model == "demo":
        return "demo"
    return "schnell" if "schnell" in model.lower() else "dev"


def warn_about(lora_name: str, lora: BranchLora, condition: Condition, attention: str) -> None:
    """Says what contradicts a LoRA's own file or, where that says nothing, the table."""
    recipe = Recipe.of(lora.metadata)
    preset = find(lora_name, lora.family)
    if recipe != Recipe() or preset is None:
        recipe.warn_about(lora_name, condition, attention)
    else:
        preset.warn_about(condition, attention)


def answer(
    lora_name: str, keys: Iterable[str], metadata: Mapping[str, str], base: str | None = None
) -> dict[str, Any]:
    """What the editor is told of a file: see "The preset of a LoRA" in CONTRIBUTING.md."""
    keys = list(keys)
    family = family_of(keys)
    if not keys:
        return _unknown(f"{lora_name} can't be read as a safetensors file; download it again.")
    named = [family.parse(key) for key in keys]
    if not all(parts and parts.module.startswith(LAYERS) for parts in named):
        return _unknown(
            f"{lora_name} doesn't look like a condition LoRA. If it is an ordinary LoRA, load it "
            f"with Load LoRA; condition LoRAs are {_families()}'s and those that Omini2 Train LoRA "
            "makes."
        )
    preset = trained(lora_name, family, metadata)
    if preset is not None:
        note = f"{lora_name} says how it was trained; these are its own settings."
    else:
        preset = find(lora_name, family)
        if preset is None:
            return _unknown(_how_treated(lora_name, family, metadata))
        note = f"Settings for {preset.source}. Prompt: {preset.prompt}."
    return {
        "known": True,
        "title": preset.title,
        "values": preset.values(base),
        "bases": list(preset.sampling),
        "note": note,
    }


def _unknown(note: str) -> dict[str, Any]:
    return {"known": False, "title": "", "values": {}, "bases": [], "note": note}


def _how_treated(lora_name: str, family: LoraFamily, metadata: Mapping[str, str]) -> str:
    attention = "independent" if Recipe.of(metadata).independent else family.attention[0]
    return (
        f"{lora_name} is none of the published condition LoRAs and doesn't say how it was trained. "
        f"It runs as {family.name}'s do: {attention}, with the placement and image size that you "
        "set; ask its author for both."
    )


def _families() -> str:
    return " or ".join(family.name for family in FAMILIES)

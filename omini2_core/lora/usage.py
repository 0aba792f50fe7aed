"""How a condition LoRA is used, and what of a user's settings contradicts it.

One description for all: :mod:`.presets` makes it from the table of published LoRAs or from what a
file says of itself.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Literal

from ..errors import Remedy, warn
from ..tokens.condition import TOKEN_PIXELS, Condition, Placement
from .family import NO_LORA, chosen_placement

Base = Literal["dev", "schnell", "demo"]
Values = dict[str, str | int | float | bool | None]
Pair = tuple[float, float]
SMALLEST = 64  # pixels that the node's ``size`` goes down to


@dataclass(frozen=True)
class Sampling:
    """How a base model is sampled; no guidance where it has no guidance embedder."""

    steps: int
    guidance: float | None = None
    image_guidance_scale: float = 1.0


@dataclass(frozen=True)
class Place:
    """Where a further condition with the same LoRA goes; as the fields of :class:`Usage`."""

    placement: str
    delta: tuple[int, int]
    size: int


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How one condition LoRA is used; None where nothing says so.

    Attributes:
        file: its name; a published one's without folder and ``.safetensors``.
        source: the repository that it is published in, and the folder there.
        shows: what its condition is.
        prompt: what the prompt says.
        attention: "joint" or "independent".
        placement: the node's word, with its delta (rows, columns), for an image of ``size``.
        position_scale: the node's, before ``compression``.
        resize: how the node brings an image to ``size``.
        size: side of the condition in pixels, before ``compression``.
        picture: side of the picture that it was shown with, in pixels.
        compression: of the conditions that it was trained with; 1 also where any will do.
        token_integration: whether Compact Tokens' switch is on.
        second: where a second condition with the same LoRA goes, if it takes two.
        beside: what else is loaded, in words.
        ordinary: names of the files beside it that go through Load LoRA.
        unconfirmed: what of all this its authors don't say.
        sampling: by base model, the recommended one first.
        trained_at: where the file says that its conditions lay, compressed as they were.
        trained_size: their width and height in pixels, compressed as they were.
    """

    file: str
    family: str
    source: str = ""
    shows: str = ""
    prompt: str = ""
    attention: str | None = None
    placement: str | None = None
    delta: tuple[int, int] = (0, 0)
    position_scale: float = 1.0
    resize: str = "off"
    size: int | None = None
    picture: int | None = None
    compression: float = 1.0
    token_integration: bool | None = None
    second: Place | None = None
    beside: str = ""
    ordinary: tuple[str, ...] = ()
    unconfirmed: str = ""
    sampling: Mapping[Base, Sampling] = field(default_factory=dict)
    trained_at: Placement | None = None
    trained_size: tuple[int, int] | None = None

    @property
    def complete(self) -> bool:
        """Whether it is enough to set the nodes by."""
        return self.attention is not None and self.size is not None

    @property
    def title(self) -> str:
        """What people call it."""
        if self.source and self.file == NO_LORA:
            return f"{self.family}: {self.shows}"
        if self.source:
            return f"{self.family} {self.file}: {self.shows}"
        return PurePosixPath(self.file.replace("\\", "/")).stem

    @property
    def note(self) -> str:
        """Where the settings come from."""
        if self.source:
            note = f"Settings for {self.source}. Prompt: {self.prompt}."
            if self.second is not None:
                words = _placed(self.second.placement, self.second.delta)
                note += f" Second condition: size {self.second.size}, placement {words}."
            note += f" Beside it: {self.beside}." if self.beside else ""
            return note + (f" Not confirmed: {self.unconfirmed}." if self.unconfirmed else "")
        return f"{self.file} says how it was trained; these are its own settings."

    def values(self, base: str | None = None, compression: float = 1.0) -> Values:
        """Widgets' names -> values, for the graph that there is.

        Args:
            base: the base model; the recommended one if it isn't known.
            compression: what Compact Tokens nodes do to the condition on its way.
        """
        sampling = self.sampling.get(base) or next(iter(self.sampling.values()))  # type: ignore[call-overload]
        # A LoRA trained on small conditions needs them small, whichever node makes them so.
        ratio = self.compression / compression if self.compression != 1 else 1.0
        size, resize = self.size, self.resize
        if ratio != 1 and size is not None:
            size = round(size * ratio / TOKEN_PIXELS) * TOKEN_PIXELS
            square = self.trained_size is None or len(set(self.trained_size)) == 1
            resize = "crop" if square and size >= SMALLEST else resize
        return {
            "family": self.family,
            "placement": self.placement,
            "delta_rows": round(self.delta[0] * ratio),
            "delta_cols": round(self.delta[1] * ratio),
            "position_scale": round(self.position_scale / ratio, 3),
            "resize": resize,
            "size": None if size is None else max(size, SMALLEST),
            "attention": self.attention,
            "compression": compression,
            "token_integration": bool(self.token_integration),
            "width": self.picture,
            "height": self.picture,
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "image_guidance_scale": sampling.image_guidance_scale,
        }

    def warn_about(self, condition: Condition, attention: str) -> None:
        """Says what of a user's settings isn't what the LoRA is for; the run goes on.

        Args:
            attention: "auto", "joint" or "independent".
        """
        name = f"{self.family}'s {self.file}" if self.source else self.file
        name = self.family if self.file == NO_LORA else name
        trained = self.attention
        if trained is not None and attention not in ("auto", trained):
            warn(
                f"attention: {name} was trained {trained}, but {attention} is set, so the "
                "picture may not follow the condition; set attention to auto.",
                Remedy({"attention": "auto"}),
            )
        integration = self.token_integration
        if integration is not None and integration != (condition.paint is not None):
            warn(
                f"condition: {name} was trained {'' if integration else 'not '}for token "
                f"integration, so switch token_integration {'on' if integration else 'off'} "
                "in Compact Tokens.",
                _set_encode({"token_integration": integration}),
            )
        width, height = (side * TOKEN_PIXELS for side in reversed(condition.hw))
        if self.trained_size is not None and (width, height) != self.trained_size:
            warn(
                f"condition: {name} was trained with conditions of "
                f"{self.trained_size[0]}x{self.trained_size[1]} pixels, this one has "
                f"{width}x{height}; resize it, or compress it in Compact Tokens, if the result is "
                "poor.",
                *_resizing(self.trained_size, self.trained_at, condition),
            )
        if self.trained_at is not None:
            _warn_about_numbers(name, self.trained_at, self.trained_size, condition)
        elif self.source:
            self._warn_about_placement(name, condition)

    def _warn_about_placement(self, name: str, condition: Condition) -> None:
        """Of a published LoRA only the node's placement is known, whatever the image's size."""
        place = condition.placement
        places = [(self.placement or "", self.delta)]
        places += [] if self.second is None else [(self.second.placement, self.second.delta)]
        for kind, delta in places:
            wanted = chosen_placement(kind, delta, (1.0, 1.0))
            if wanted.kind != "custom":
                wanted = replace(wanted, scale=place.scale)
            moved, trained = (_moved(p, condition.hw) for p in (place, wanted))
            if [round(m, 2) for m in moved] == [round(t, 2) for t in trained]:
                return
        words = " or ".join(_placed(*each) for each in places)
        warn(
            f"placement: {name} was trained with placement {words}, but this condition lies "
            f"elsewhere ({place.kind}); set placement to {words} in Omini2 Condition Encode.",
            *([_set_encode(_place_values(*places[0]))] if len(places) == 1 else []),
        )


def _set_encode(values: Mapping[str, str | int | float | bool]) -> Remedy:
    """A remedy on a node that the condition comes through."""
    return Remedy(values, ("condition",))


def _place_values(placement: str, delta: tuple[int, int]) -> dict[str, str | int]:
    if placement != "custom":
        return {"placement": placement}
    return {"placement": placement, "delta_rows": delta[0], "delta_cols": delta[1]}


def _compressed_by(condition: Condition) -> Pair:
    """How many tokens of the image, along each side, one of the condition's stands for."""
    rows, columns = (max(1, side // TOKEN_PIXELS) for side in condition.image_size)
    return rows / condition.hw[0], columns / condition.hw[1]


def _resizing(
    trained: tuple[int, int], trained_at: Placement | None, condition: Condition
) -> Iterator[Remedy]:
    """Ways to a condition of a size, in pixels: compression or a smaller image."""
    rows, columns = (side // TOKEN_PIXELS for side in condition.image_size)
    shares = trained[0] / TOKEN_PIXELS / columns, trained[1] / TOKEN_PIXELS / rows
    if abs(shares[0] - shares[1]) > 1e-6:
        return  # another shape
    if shares[0] < 1:
        yield _set_encode({"compression": round(shares[0], 4)})
    before = round(trained[0] * _compressed_by(condition)[1])
    if trained[0] == trained[1] and before >= SMALLEST:
        values: dict[str, str | int | float | bool] = {"resize": "crop", "size": before}
        if trained_at is not None and trained_at.scale[0] == trained_at.scale[1]:
            values["position_scale"] = trained_at.scale[0] / _compressed_by(condition)[0]
        yield _set_encode(values)


def _placed(placement: str, delta: tuple[int, int]) -> str:
    """A placement in the node's words."""
    if placement != "custom":
        return placement
    return f"custom with delta_rows {delta[0]} and delta_cols {delta[1]}"


def _lies_over_the_same(size: tuple[int, int] | None, scale: Pair, condition: Condition) -> bool:
    """Whether an image of another size lies over the same part of the picture as a trained one."""
    if size is None:
        return False
    trained = size[1] / TOKEN_PIXELS * scale[0], size[0] / TOKEN_PIXELS * scale[1]
    (rows, columns), (down, across) = condition.hw, condition.placement.scale
    return _close((rows * down, columns * across), trained)


def _warn_about_numbers(
    name: str, trained_at: Placement, trained_size: tuple[int, int] | None, condition: Condition
) -> None:
    """A trained file says where its conditions lay, to the token."""
    place, wanted = condition.placement, trained_at.scale
    # With `fit` the scale follows from a picture that isn't known yet; then only moving counts.
    scale = wanted if place.kind == "fit" else place.scale
    trained = _moved(trained_at, condition.hw)
    moved = _moved(replace(place, scale=scale), condition.hw)
    if not _close(moved, trained):
        by = _compressed_by(condition)
        node = tuple(t * c / s for t, s, c in zip(trained, scale, by, strict=True))
        kinds = {
            Placement(kind).delta_for(condition.hw): kind
            for kind in ("aligned", "left", "right", "above", "below")
        }
        lies = trained[0] / scale[0], trained[1] / scale[1]
        kind, delta = kinds.get(lies, "custom"), (round(node[0]), round(node[1]))
        words = kind
        if kind == "custom":
            words = f"custom with delta_rows {node[0]:g} and delta_cols {node[1]:g}"
        whole = kind != "custom" or delta == node
        warn(
            f"placement: {name} was trained with conditions moved by {trained[0]:g} rows and "
            f"{trained[1]:g} columns, this one is moved by {moved[0]:g} and {moved[1]:g}; "
            f"set placement to {words} in Omini2 Condition Encode.",
            *([_set_encode(_place_values(kind, delta))] if whole else []),
        )
    elif not _close(scale, wanted) and not _lies_over_the_same(trained_size, wanted, condition):
        by = _compressed_by(condition)
        set_to = wanted[0] / by[0], wanted[1] / by[1]
        warn(
            f"position_scale: {name} was trained with {_words(wanted)} picture tokens per "
            f"condition token, this condition has {_words(scale)}; set position_scale to "
            f"{_words(set_to)} in Omini2 Condition Encode, or compress in Compact Tokens.",
            *([_set_encode({"position_scale": set_to[0]})] if set_to[0] == set_to[1] else []),
        )


def _moved(place: Placement, hw: tuple[int, int]) -> Pair:
    """Rows and columns of the picture by which a condition of ``hw`` tokens is moved."""
    rows, columns = place.delta_for(hw)
    return rows * place.scale[0], columns * place.scale[1]


def _words(pair: Pair) -> str:
    return f"{pair[0]:g}" if pair[0] == pair[1] else f"{pair[0]:g} and {pair[1]:g}"


def _close(a: Pair, b: Pair) -> bool:
    return all(abs(x - y) <= 0.01 * max(abs(y), 1) for x, y in zip(a, b, strict=True))

"""How a condition LoRA was trained, as its file says, and what contradicts it."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import warn
from ..tokens.condition import MAX_DELTA, MAX_SCALE, MIN_SCALE, TOKEN_PIXELS, Condition

PREFIX = "omini2."
MAX_SIDE = 1 << 14  # pixels
LENGTH = 200  # letters; the trainer writes no longer value


@dataclass(frozen=True)
class Recipe:
    """What a file's metadata says; None where it says nothing.

    Attributes:
        independent: whether the condition attended to itself only.
        delta: rows and columns of the condition's first token, in picture tokens.
        scale: picture tokens per condition token (rows, columns).
        size: the condition's width and height in pixels.
        integration: whether it was trained for token integration.
    """

    independent: bool | None = None
    delta: tuple[float, float] | None = None
    scale: tuple[float, float] | None = None
    size: tuple[int, int] | None = None
    integration: bool | None = None

    @staticmethod
    def of(metadata: Mapping[str, str]) -> "Recipe":
        """Reads a file's metadata; whatever isn't as the trainer writes it counts as not said."""
        said = said_in(metadata)
        scale = numbers(said.get("position_scale"), ",", MIN_SCALE, MAX_SCALE)
        if scale is not None and len(scale) == 1:
            scale = scale * 2
        delta = _pair(numbers(said.get("position_delta"), ",", -MAX_DELTA, MAX_DELTA))
        scale = _pair(scale)
        size = _pair(numbers(said.get("condition_size"), "x", 1, MAX_SIDE))
        if "," in said.get("compression", ""):  # trained at several sizes, any of which will do
            scale = size = None
        return Recipe(
            _flag(said.get("independent_condition")),
            delta,
            scale,
            None if size is None else (int(size[0]), int(size[1])),
            _flag(said.get("integration")),
        )

    def warn_about(self, name: str, condition: Condition, attention: str) -> None:
        """Says what of a user's settings isn't what a LoRA was trained with; the run goes on.

        Args:
            name: the LoRA's file name.
            attention: "auto", "joint" or "independent".
        """
        if self.independent is not None and attention != "auto":
            trained = "independent" if self.independent else "joint"
            if attention != trained:
                warn(
                    f"attention: {name} was trained {trained}, but {attention} is set, so the "
                    "picture may not follow the condition; set attention to auto."
                )
        if self.integration is not None and self.integration != (condition.paint is not None):
            warn(
                f"condition: {name} was trained {'' if self.integration else 'not '}for token "
                f"integration, so switch token_integration {'on' if self.integration else 'off'} "
                "in Compact Tokens."
            )
        self._warn_about_place(name, condition)

    def _warn_about_place(self, name: str, condition: Condition) -> None:
        width, height = (side * TOKEN_PIXELS for side in reversed(condition.hw))
        if self.size is not None and (width, height) != self.size:
            warn(
                f"condition: {name} was trained with conditions of "
                f"{self.size[0]}x{self.size[1]} pixels, this one has {width}x{height}; resize it, "
                "or compress it in Compact Tokens, if the result is poor."
            )
        place = condition.placement
        if self.scale is None or self.delta is None:
            return
        # With `fit` the scale follows from a picture that isn't known yet; then only moving counts.
        scale = self.scale if place.kind == "fit" else place.scale
        trained = self.delta[0] * self.scale[0], self.delta[1] * self.scale[1]
        delta = place.delta_for(condition.hw)
        moved = delta[0] * scale[0], delta[1] * scale[1]
        if not _close(moved, trained):
            warn(
                f"placement: {name} was trained with conditions moved by {trained[0]:g} rows and "
                f"{trained[1]:g} columns, this one is moved by {moved[0]:g} and {moved[1]:g}; "
                f"set placement to {_placement_words(self, scale)} in Omini2 Condition Encode."
            )
        elif not _close(scale, self.scale):
            warn(
                f"position_scale: {name} was trained with {_words(self.scale)} picture tokens per "
                f"condition token, this condition has {_words(scale)}; set position_scale to "
                f"{_words(self.scale)} in Omini2 Condition Encode, or compress in Compact Tokens."
            )


def _placement_words(recipe: Recipe, scale: tuple[float, float]) -> str:
    assert recipe.delta is not None and recipe.scale is not None
    if recipe.delta == (0.0, 0.0):
        return "aligned"
    rows, columns = (d * s / t for d, s, t in zip(recipe.delta, recipe.scale, scale, strict=True))
    return f"custom with delta_rows {rows:g} and delta_cols {columns:g}"


def _words(pair: tuple[float, float]) -> str:
    return f"{pair[0]:g}" if pair[0] == pair[1] else f"{pair[0]:g} and {pair[1]:g}"


def _close(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return all(abs(x - y) <= 0.01 * max(abs(y), 1) for x, y in zip(a, b, strict=True))


def _flag(text: str | None) -> bool | None:
    return None if text is None else {"true": True, "1": True}.get(text.lower(), False)


def said_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """What the trainer has written into a file's metadata, without the keys' prefix."""
    return {
        key.removeprefix(PREFIX): value
        for key, value in metadata.items()
        if key.startswith(PREFIX) and len(value) <= LENGTH
    }


def numbers(text: str | None, separator: str, low: float, high: float) -> tuple[float, ...] | None:
    """A list of numbers; None if it is none, or one is out of bounds or NaN."""
    try:
        values = () if text is None else tuple(float(part) for part in text.split(separator))
    except ValueError:
        return None
    return values if values and all(low <= value <= high for value in values) else None


def _pair(values: tuple[float, ...] | None) -> tuple[float, float] | None:
    return None if values is None or len(values) != 2 else (values[0], values[1])

"""How the extension speaks to the person at the screen."""

import logging
import math
from collections.abc import Callable, Sequence

_listeners: list[Callable[[str], None]] = []


class Omini2Error(ValueError):
    """An input that can't be used: one sentence naming the node input and the way out."""


def warn(message: str) -> None:
    """Says what was changed or left out although the run goes on."""
    logging.warning("Omini2: %s", message)
    for listener in _listeners:
        listener(message)


def on_warning(listener: Callable[[str], None]) -> None:
    """Has every warning handed on as well, to where the person sees it."""
    _listeners.append(listener)


def require_choice(name: str, value: object, options: Sequence[str]) -> None:
    """Refuses a value that a node's list doesn't offer; not every host checks that itself."""
    if value not in options:
        raise Omini2Error(f"{name}: {value} is not on offer; choose {' or '.join(options)}.")


def require_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuses a number outside of its bounds, NaN included."""
    if not low <= value <= high:
        bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise Omini2Error(f"{name}: {value:g} is out of bounds; use a value {bounds}.")

"""How the extension speaks to the person at the screen."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

SHOWN = 100  # letters of a name or value from outside


@dataclass(frozen=True)
class Remedy:
    """What to set on a node so that a warning has no more reason.

    Attributes:
        values: input -> value, all of one node.
        along: inputs of the node that is looked from, behind which the node to set is the nearest
            that has these values; that node itself, if it has them.
        node: the id of the node that is looked from; the one that runs, if none.
    """

    values: Mapping[str, str | int | float | bool]
    along: tuple[str, ...] = ()
    node: str | None = None


Listener = Callable[[str, Sequence[Remedy]], None]
_listeners: list[Listener] = []


class Omini2Error(ValueError):
    """An input that can't be used: one sentence naming the node input and the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))


def warn(message: str, *remedies: Remedy) -> None:
    """Says what was changed or left out although the run goes on.

    Args:
        remedies: each of which helps by itself, where any is known.
    """
    message = _printable(message)
    logging.warning("Omini2: %s", message)
    for listener in _listeners:
        listener(message, remedies)


def on_warning(listener: Listener) -> None:
    """Has every warning handed on as well, to where the person sees it."""
    _listeners.append(listener)


def require_choice(name: str, value: object, options: Sequence[str]) -> None:
    """Refuses a value that a node's list doesn't offer; not every host checks that itself."""
    if value not in options:
        raise Omini2Error(f"{name}: {brief(value)} is not on offer; choose {' or '.join(options)}.")


def require_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuses a number outside of its bounds, NaN included."""
    if not isinstance(value, int | float) or not low <= value <= high:
        bounds = (
            f"from {low:.10g} to {high:.10g}" if math.isfinite(high) else f"of at least {low:.10g}"
        )
        given = f"{value:g}" if isinstance(value, float) else brief(value)
        raise Omini2Error(f"{name}: {given} is out of bounds; use a value {bounds}.")


def require_known(foreign: Iterable[str]) -> None:
    """Refuses inputs that a node doesn't have: the host hands over whatever is connected."""
    for name in foreign:
        raise Omini2Error(
            f"{brief(name)}: this node has no such input in the version that is installed; update "
            "the extension, or disconnect it."
        )


def require_kind(name: str, value: object, right: bool, what: str, connect: str) -> None:
    """Refuses a value of another kind than an input's: a workflow can put text where a link goes.

    Args:
        what: what the input takes, and ``connect`` the node that gives it.
    """
    if not right:
        kind = type(value).__name__
        raise Omini2Error(f"{name}: this is no {what} but {kind}; connect {connect}.")


def brief(value: object) -> str:
    """What a sentence shows of something from outside, which may be of any length."""
    try:
        text = str(value).replace("\n", " ")
    except ValueError:  # Python refuses to write whole numbers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _printable(text: str) -> str:
    """Names from outside may hold what no log or screen can show, or what reorders a line."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)

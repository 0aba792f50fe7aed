"""What can be refused when a prompt is queued: what its own constants say, before anything loads.

The host asks each node's ``validate_inputs``, with the inputs that it names and nothing of the
graph. It blames every input that is named, so our nodes name one, and look up the others here.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from comfy_execution.utils import get_executing_context

from ..errors import Omini2Error

Inputs = Mapping[str, Any]

# Of the request that is being answered, so that two editors don't meet.
_request: ContextVar[Mapping[str, Any] | None] = ContextVar("omini2_queued", default=None)


@dataclass(frozen=True)
class Node:
    """A node of the prompt: its id, its type and its inputs, where a wire is a list."""

    number: str
    kind: str
    inputs: Inputs

    def constant(self, name: str) -> float | None:
        """An input's number; none where a wire brings it, as then it isn't known."""
        value = self.inputs.get(name)
        known = isinstance(value, int | float) and math.isfinite(value)
        return value if known else None

    def source(self, name: str) -> "tuple[Node, int] | None":
        """The node that an input comes from, and which of its outputs; none without a wire."""
        wire = self.inputs.get(name)
        if not isinstance(wire, list) or len(wire) != 2 or not isinstance(wire[1], int):
            return None
        node = node_of(wire[0])
        return None if node is None else (node, wire[1])

    @property
    def host_class(self) -> Any:
        """What the host has for its type; none of a type that it doesn't know."""
        known = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})  # the host's
        return known.get(self.kind)

    def readers(self, *names: str) -> Iterator["Node"]:
        """The nodes that have an output of this one at an input of these names; at any without."""
        for each in nodes():
            found = [each.source(name) for name in names or each.inputs]
            if any(source is not None and source[0].number == self.number for source in found):
                yield each


def remember(request: dict[str, Any]) -> dict[str, Any]:
    """Takes note of a prompt before the host checks it."""
    _request.set(request if isinstance(request, Mapping) else {})
    return request


def nodes() -> Iterator[Node]:
    """All nodes of the prompt."""
    found = map(node_of, _prompt())
    return (each for each in found if each is not None)


def node_of(number: object) -> Node | None:
    """The node of an id; none where the prompt has no such node, or something else there."""
    found = _prompt().get(str(number))
    found = found if isinstance(found, Mapping) else {}
    kind, given = found.get("class_type"), found.get("inputs")
    if not isinstance(kind, str) or not isinstance(given, Mapping):
        return None
    return Node(str(number), kind, given)


def current() -> Node | None:
    """The node that is being checked."""
    context = get_executing_context()
    return None if context is None else node_of(context.node_id)


def targets() -> set[str] | None:
    """The ids of the outputs that are wanted; none where all are."""
    found = (_request.get() or {}).get("partial_execution_targets")
    return set(map(str, found)) if isinstance(found, list) else None


def inputs() -> Inputs:
    """The inputs of the node that is being checked, as queued: a wire is a list."""
    node = current()
    return {} if node is None else node.inputs


def behind(name: str, kind: str) -> Inputs:
    """The inputs of the node that an input comes from, if it is of a kind; else none."""
    node = current()
    found = None if node is None else node.source(name)
    return found[0].inputs if found is not None and found[0].kind == kind else {}


def constant(of: Inputs, name: str, default: Any) -> Any:
    """An input's value; the default where a wire brings it, as then it isn't known."""
    value = of.get(name, default)
    return default if isinstance(value, list) else value


def verdict(name: str, check: Callable[[], object]) -> bool | str:
    """The host's answer for an input: True, or what is wrong. The host puts the name before it."""
    try:
        check()
    except Omini2Error as error:
        return str(error).removeprefix(f"{name}: ")
    return True


def _prompt() -> Mapping[str, Any]:
    prompt = (_request.get() or {}).get("prompt")
    return prompt if isinstance(prompt, Mapping) else {}

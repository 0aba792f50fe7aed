"""What can be refused when a prompt is queued: what its own constants say, before anything loads.

The host asks each node's ``validate_inputs``, with the inputs that it names and nothing of the
graph. It blames every input that is named, so our nodes name one, and look up the others here.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from comfy_execution.utils import get_executing_context

from ..errors import Omini2Error

Inputs = Mapping[str, Any]

# Of the request that is being answered, so that two editors don't meet.
_prompt: ContextVar[Mapping[str, Any] | None] = ContextVar("omini2_queued", default=None)


def remember(request: dict[str, Any]) -> dict[str, Any]:
    """Takes note of a prompt before the host checks it."""
    prompt = request.get("prompt")
    _prompt.set(prompt if isinstance(prompt, Mapping) else {})
    return request


def inputs() -> Inputs:
    """The inputs of the node that is being checked, as queued: a wire is a list."""
    context = get_executing_context()
    return {} if context is None else _node(context.node_id).get("inputs", {})


def behind(name: str, kind: str) -> Inputs:
    """The inputs of the node that an input comes from, if it is of a kind; else none."""
    wire = inputs().get(name)
    node = _node(wire[0]) if isinstance(wire, list) and len(wire) == 2 else {}
    return node.get("inputs", {}) if node.get("class_type") == kind else {}


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


def _node(number: object) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (_prompt.get() or {}).get(str(number), {})
    return found

"""Which node of a graph a warning's remedy is for."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import Remedy

Prompt = Mapping[str, Any]  # node id -> {"class_type": ..., "inputs": {...}}, as the host runs it


def place(remedy: Remedy, prompt: Prompt, running: str | None) -> str | None:
    """The id of the node to set; None where there is none, or a wire brings its values.

    Args:
        running: the id of the node that runs.
    """
    start = remedy.node or running
    if start is None or start not in prompt:
        return None
    if _takes(prompt[start], remedy):
        return start
    waiting = deque(_behind(prompt[start], remedy.along))
    seen = {start}
    while waiting:
        number = waiting.popleft()
        if number in seen or number not in prompt:
            continue
        if _takes(prompt[number], remedy):
            return number
        seen.add(number)
        waiting.extend(_behind(prompt[number]))
    return None


def _takes(node: Mapping[str, Any], remedy: Remedy) -> bool:
    inputs = node.get("inputs", {})
    return all(name in inputs and not isinstance(inputs[name], list) for name in remedy.values)


def _behind(node: Mapping[str, Any], along: tuple[str, ...] | None = None) -> Iterator[str]:
    """The nodes that inputs come from, in the inputs' order."""
    for name, value in node.get("inputs", {}).items():
        linked = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
        if linked and (along is None or name in along):
            yield value[0]

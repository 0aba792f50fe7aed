"""Graph files of ComfyUI's editor -> API prompts, the form that a server's /prompt takes.

The editor does this in the browser. Doing it here, from what the server says about its nodes
(/object_info), makes the graph files the only copies there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

GraphFile = dict[str, Any]
Prompt = dict[str, dict[str, Any]]
ObjectInfo = dict[str, dict[str, Any]]

EDITOR_ONLY = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
MUTED, BYPASSED = 2, 4  # values of a node's mode
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEEDS = {"seed", "noise_seed"}  # old-style nodes get control_after_generate by these names


class WorkflowError(ValueError):
    """A graph that can't be converted, in one sentence."""


@dataclass(frozen=True)
class Widget:
    """A value that is set on a node itself.

    Attributes:
        name: the input that it belongs to; None for one that exists in the editor alone.
    """

    name: str | None
    default: Any = None


def widgets(info: dict[str, Any]) -> Iterator[Widget]:
    """A node's widgets in the editor's order, which graph files store their values in."""
    for section in ("required", "optional"):
        inputs = info["input"].get(section) or {}
        names = (info.get("input_order") or {}).get(section) or list(inputs)
        for name in names:
            kind, options = _definition(inputs[name])
            if not is_widget(kind, options):
                continue
            yield Widget(name, _default(kind, options))
            if has_control(name, kind, options):
                yield Widget(None)
        if any(_definition(entry)[1].get("image_upload") for entry in inputs.values()):
            yield Widget(None)  # the upload button


def _definition(entry: Any) -> tuple[Any, dict[str, Any]]:
    kind, *options = entry
    return kind, (options[0] if options else {}) or {}


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    """Whether the editor shows an input as a widget."""
    is_value = isinstance(kind, list) or kind in WIDGET_TYPES
    return is_value and not options.get("forceInput")


def has_control(name: str, kind: Any, options: dict[str, Any]) -> bool:
    """Whether "control after generate" follows, with a value of its own."""
    return bool(options.get("control_after_generate")) or (kind == "INT" and name in SEEDS)


def combo_values(entry: Any) -> list[Any] | None:
    """What a combo offers, old style or new; None for inputs of other kinds."""
    kind, options = _definition(entry)
    if isinstance(kind, list):
        return kind
    return options.get("options", []) if kind == "COMBO" else None


def _default(kind: Any, options: dict[str, Any]) -> Any:
    if "default" in options:
        return options["default"]
    offered = combo_values([kind, options])
    return offered[0] if offered else None


def widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """A node's values by input name; a widget that the file doesn't know yet gets its default."""
    stored = node.get("widgets_values") or []
    known = list(widgets(info))
    if isinstance(stored, dict):
        return {w.name: stored.get(w.name, w.default) for w in known if w.name}
    values = [*stored, *(w.default for w in known[len(stored) :])]
    return {w.name: value for w, value in zip(known, values) if w.name}  # noqa: B905 - extra ones


def to_prompt(graph: GraphFile, object_info: ObjectInfo) -> Prompt:
    """What the server has to be sent to run a graph.

    Raises:
        WorkflowError: a kind of node that the server doesn't have (subgraphs included).
    """
    links = _Links(graph)
    prompt: Prompt = {}
    for node in graph["nodes"]:
        if node["type"] in EDITOR_ONLY or node["mode"] in (MUTED, BYPASSED):
            continue
        info = object_info.get(node["type"])
        if info is None:
            raise WorkflowError(f"node {node['id']}: the server has no node {node['type']}")
        inputs = widget_values(node, info)
        for slot in node.get("inputs") or []:
            inputs.update(links.value(slot))
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title") or info.get("display_name") or node["type"]},
        }
    return prompt


class _Links:
    """Finds what a link really comes from."""

    def __init__(self, graph: GraphFile) -> None:
        self._nodes = {node["id"]: node for node in graph["nodes"]}
        self._sources = {link[0]: (link[1], link[2]) for link in graph["links"]}

    def value(self, slot: dict[str, Any]) -> dict[str, Any]:
        """What goes into an input that may be linked: {name: value}, or nothing."""
        source = self._resolve(slot.get("link"))
        if source is None:
            return {}
        node, output = source
        if node["type"] == "PrimitiveNode":
            return {slot["name"]: node["widgets_values"][0]}
        return {slot["name"]: [str(node["id"]), output]}

    def _resolve(self, link: int | None) -> tuple[dict[str, Any], int] | None:
        """Follows a link through reroutes and bypassed nodes; None where it comes from nowhere."""
        while link is not None:
            origin, output = self._sources[link]
            node = self._nodes[origin]
            if node["mode"] == MUTED:
                return None
            if node["type"] == "Reroute":
                link = node["inputs"][0].get("link")
            elif node["mode"] == BYPASSED:
                link = _passed_on(node, output)
            else:
                return node, output
        return None


def _passed_on(node: dict[str, Any], output: int) -> int | None:
    """The link whose value a bypassed node hands on: same place first, then the same type."""
    kind = node["outputs"][output]["type"]
    inputs = node.get("inputs") or []
    for slot in [*inputs[output : output + 1], *inputs]:
        if slot["type"] == kind:
            return slot.get("link")
    return None

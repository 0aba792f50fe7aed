"""What several nodes share: their schema, the condition's socket, common inputs, the node's id."""

from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io

from ..omini2_core.host import queued, setup
from ..omini2_core.host.versions import search_aliases as aliases

OminiCondition = io.Custom("OMINI2_CONDITION")
WORDS: dict[str, Sequence[str]] = {}  # node id -> what it is found by, for hosts without aliases
LoraChoice = io.Custom("COMBO")  # what goes into a list of files: the host's own output has no type


def schema(
    *,
    search_aliases: Sequence[str],
    wants_id: bool = False,
    wants_graph: bool = False,
    **given: Any,
) -> io.Schema:
    """``io.Schema``; hosts older than its ``search_aliases`` go without.

    Args:
        search_aliases: words to find the node by.
        wants_id: whether ``execute`` asks for :func:`node_id`.
        wants_graph: whether it asks which files a MODEL comes from.
    """
    if wants_id:
        # The id is no input: it is neither in the contract of a node nor in a workflow's file. And
        # without `not_idempotent` the host would hand over one node's kept result for another with
        # the same inputs, and the id in it would be the other's.
        hidden = [io.Hidden.unique_id, *([io.Hidden.prompt] if wants_graph else [])]
        given |= {"hidden": hidden, "not_idempotent": True}
    WORDS[given["node_id"]] = search_aliases
    return io.Schema(**given, **aliases(search_aliases))


def advanced(given: io.Input) -> io.Input:
    """The same input, shown only when the person asks for more options."""
    given.extra_dict["advanced"] = True  # newer hosts have an argument for it
    return given


def node_id(node: type[io.ComfyNode]) -> str | None:
    """The editor's id of the node that runs, so that what a run did can be shown on it.

    As the host executes it, "12:3" for node 3 in subgraph 12; None outside of a graph.
    """
    return None if node.hidden is None else node.hidden.unique_id


def leads_on(node: type[io.ComfyNode], output: int) -> bool:
    """Whether another node takes an output of the one that runs; True where nobody knows."""
    graph = getattr(node.hidden, "prompt", None)
    number = node_id(node)
    if not isinstance(graph, Mapping) or number not in graph:
        return True
    links = (link for each in graph.values() for link in each.get("inputs", {}).values())
    return any(link == [number, output] for link in links)


def conditioned_model() -> io.Model.Input:
    """An input for a model that earlier nodes have given conditions."""
    return io.Model.Input("model", tooltip="A model with one or more conditions applied.")


def condition() -> io.Input:
    """An input for a condition."""
    return OminiCondition.Input("condition", tooltip="From Omini2 Condition Encode.")


def condition_scale(neutral: str) -> io.Float.Input:
    """An input for how strongly a condition counts.

    Args:
        neutral: what 1 means.
    """
    return scale("condition_scale", "condition", "shuts it out", neutral)


def scale(name: str, which: str, none: str, neutral: str) -> io.Float.Input:
    """An input for how strongly something is looked at.

    Args:
        which: it is.
        none: what 0 does.
        neutral: what 1 means.
    """
    return io.Float.Input(
        name,
        default=1.0,
        min=0.0,
        max=10.0,
        step=0.05,
        tooltip=f"How much text and picture look at this {which}: 0 {none}, 1 is {neutral}, above "
        "1 is stronger.",
    )


def compression(which: str, more: str) -> io.Float.Input:
    """An input for fewer tokens.

    Args:
        which: image they are of.
        more: how the tooltip goes on.
    """
    return io.Float.Input(
        "compression",
        default=1.0,
        min=0.05,
        max=1.0,
        step=0.05,
        tooltip=f"Side of the {which} image relative to now: 1 is off, 0.5 leaves a quarter of the "
        f"tokens{more}",
    )


def require_share(given: queued.Inputs) -> None:
    """Refuses at queueing a condition that could never take part."""
    start, end = ((f"{name}_percent", share) for name, share in (("start", 0.0), ("end", 1.0)))
    setup.require_share(1.0, queued.constant(given, *start), queued.constant(given, *end))


def start_and_end(which: str = "condition") -> list[io.Input]:
    """Inputs for when a condition, or what ``which`` says, takes part."""
    return [
        io.Float.Input(
            f"{name}_percent",
            default=default,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip=f"When the {which} {what} part, as a share of sampling.",
        )
        for name, default, what in (("start", 0.0, "starts to take"), ("end", 1.0, "stops taking"))
    ]

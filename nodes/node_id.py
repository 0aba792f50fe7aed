"""The editor's id of the node that runs, so that what a run did can be shown on it."""

from comfy_api.latest import io

# Not an input: it is not in the contract of a node, nor in a workflow's file. The host counts it
# among what a node's result depends on, so a kept result never tells of another node.
NODE_ID = [io.Hidden.unique_id]


def node_id(node: type[io.ComfyNode]) -> str | None:
    """The id as the host executes it, "12:3" for node 3 in subgraph 12; None outside of a graph."""
    return None if node.hidden is None else node.hidden.unique_id

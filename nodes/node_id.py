"""The editor's id of the node that runs, so that what a run did can be shown on it."""

from comfy_api.latest import io

# Not an input: it is neither in the contract of a node nor in a workflow's file. A node that asks
# for it has to be `not_idempotent` as well: the host would hand over one node's kept result for
# another with the same inputs, and the id in it would be the other's.
NODE_ID = [io.Hidden.unique_id]


def node_id(node: type[io.ComfyNode]) -> str | None:
    """The id as the host executes it, "12:3" for node 3 in subgraph 12; None outside of a graph."""
    return None if node.hidden is None else node.hidden.unique_id

"""The socket type that carries a condition from node to node."""

from comfy_api.latest import io

OminiCondition = io.Custom("OMINI2_CONDITION")

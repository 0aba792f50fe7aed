"""What the host asks for the nodes."""

from comfy_api.latest import ComfyExtension, io

from ..omini2_core.demo import files as demo_files
from ..omini2_core.host import routes
from . import NODES, common


class Omini2Extension(ComfyExtension):
    """The nodes, as the host asks for them."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> Omini2Extension:
    demo_files.register_loras()
    for node in NODES:
        node.define_schema()
    routes.register(common.WORDS)
    return Omini2Extension()

"""OminiControl2 for FLUX: image conditions as tokens in ComfyUI's own FLUX.1."""

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES
from .omini2_core import demo_files, host_routes

WEB_DIRECTORY = "./web"


class Omini2Extension(ComfyExtension):
    """What the host asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> Omini2Extension:
    demo_files.register_loras()
    host_routes.register()
    return Omini2Extension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

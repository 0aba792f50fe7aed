"""OminiControl2 for FLUX: image conditions as tokens in ComfyUI's own FLUX.1."""

from .omini2_core.host import versions

if versions.refused():
    # No nodes, but no error either: what is wrong has been said in one sentence.
    NODE_CLASS_MAPPINGS: dict[str, type] = {}
    WEB_DIRECTORY = "./web_refused"
else:
    from .nodes.extension import comfy_entrypoint as comfy_entrypoint

    WEB_DIRECTORY = "./web"

"""Omini2 Demo Model: a tiny FLUX.1 that comes with the extension."""

from comfy_api.latest import io

from ..omini2_core.errors import require_known
from . import common


class DemoModel(io.ComfyNode):
    """The three loaders of a FLUX.1 graph in one, for a first try without a checkpoint."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return common.schema(
            node_id="Omini2DemoModel",
            display_name="Omini2 Demo Model",
            category="Omini2/demo",
            description="A FLUX.1 of 5 million parameters that comes with the extension, to try "
            "a graph on any computer in seconds, without a download. It draws stars, rings and "
            "squares at 256x256 and nothing else: for real pictures put the stock loaders with a "
            "FLUX.1 checkpoint in its place.",
            search_aliases=["ominicontrol", "try", "example model", "tiny flux"],
            inputs=[],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The tiny FLUX.1, with a guidance embedder as FLUX.1-dev has. "
                    "Published LoRAs are made for the real one and don't fit it.",
                ),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="Its text encoder, for CLIP Text Encode. It knows a few dozen words, "
                    "as in: a big red star on the left on a blue background.",
                ),
                io.Vae.Output(
                    display_name="vae",
                    tooltip="Its VAE: 16 latent channels at an eighth of the size, as FLUX.1's. "
                    "Latents of the two can't be exchanged.",
                ),
            ],
        )

    @classmethod
    def execute(cls, **foreign: object) -> io.NodeOutput:
        require_known(foreign)
        # Here and not above: should a host's change break the demo, the other nodes still load.
        from ..omini2_core.demo import model as demo_model

        return io.NodeOutput(*demo_model.load())

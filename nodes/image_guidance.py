"""Omini2 Image Guidance: pushes the picture away from what a black condition would give."""

from dataclasses import replace

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..omini2_core.errors import require_known
from ..omini2_core.host.attach import get_setup, with_setup
from ..omini2_core.host.model import require_flux1
from . import common


class ImageGuidance(io.ComfyNode):
    """Sets image_guidance_scale."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return common.schema(
            node_id="Omini2ImageGuidance",
            display_name="Omini2 Image Guidance",
            category="Omini2",
            description="Strengthens what the conditions contribute by comparing each step with "
            "one whose condition images are black. Needed by the subject and art style LoRAs on "
            "FLUX.1-dev. Each step takes about twice as long.",
            search_aliases=["ominicontrol", "image cfg", "reference strength", "subject"],
            inputs=[
                common.conditioned_model(),
                io.Float.Input(
                    "image_guidance_scale",
                    default=1.5,
                    min=0.0,
                    max=20.0,
                    step=0.05,
                    tooltip="1 is off and costs nothing; 1.5 is what the subject LoRAs need on "
                    "FLUX.1-dev.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The same model with image guidance.")
            ],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, image_guidance_scale: float, **foreign: object
    ) -> io.NodeOutput:
        require_known(foreign)
        require_flux1(model)
        setup = replace(get_setup(model), image_guidance_scale=image_guidance_scale)
        return io.NodeOutput(with_setup(model, setup))

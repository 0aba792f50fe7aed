"""Omini2 Condition Encode: an image becomes a condition."""

from dataclasses import replace
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..omini2_core.errors import require_kind, require_known
from ..omini2_core.host import images, queued
from ..omini2_core.lora.family import PLACEMENT_CHOICES, chosen_placement
from ..omini2_core.tokens.condition import Placement
from ..omini2_core.tokens.encode import encode_condition
from ..omini2_core.tokens.resize import RESIZE, resized
from . import common


class ConditionEncode(io.ComfyNode):
    """Image and VAE in, OMINI2_CONDITION out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return common.schema(
            node_id="Omini2ConditionEncode",
            display_name="Omini2 Condition Encode",
            category="Omini2",
            description="Turns an image (edges, depth, a subject, a blurred or masked picture) "
            "into condition tokens for FLUX.1.",
            search_aliases=[
                "ominicontrol",
                "control image",
                "controlnet",
                "reference image",
                "subject",
                "canny",
                "edges",
                "depth",
                "pose",
                "image to condition",
            ],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="What to condition on. One token is 16x16 pixels, so 512x512 makes "
                    "1024 tokens; most published LoRAs were trained at 512. Sides are cropped "
                    "around the centre to multiples of 16.",
                ),
                io.Vae.Input("vae", tooltip="FLUX.1's VAE (ae.safetensors)."),
                io.Combo.Input(
                    "placement",
                    options=list(PLACEMENT_CHOICES),
                    default="aligned",
                    tooltip="Where the condition lies beside the picture. aligned: same place, "
                    "token by token (edges, depth). fit: stretched over the whole picture, "
                    "whatever its size. left, right, above, below: next to it (subjects: right "
                    "for subject_512, left for art styles). custom: moved by delta_rows and "
                    "delta_cols. easycontrol_subject: 64 rows down, where EasyControl's subject "
                    "LoRA looks for it; its other LoRAs want fit.",
                ),
                io.Int.Input(
                    "delta_rows",
                    default=0,
                    min=-1024,
                    max=1024,
                    tooltip="Rows down, in tokens of 16 pixels. Only for placement custom.",
                ),
                io.Int.Input(
                    "delta_cols",
                    default=0,
                    min=-1024,
                    max=1024,
                    tooltip="Columns to the right, in tokens of 16 pixels. Only for placement "
                    "custom.",
                ),
                io.Float.Input(
                    "position_scale",
                    default=1.0,
                    min=0.05,
                    max=64.0,
                    step=0.05,
                    tooltip="Picture tokens that one condition token stands for, along each "
                    "side: 2 for a condition image of half the picture's size. Not used with "
                    "placement fit, which works it out.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Keeps only the tokens that the mask touches. Fewer tokens cost less.",
                ),
                io.Combo.Input(
                    "resize",
                    options=list(RESIZE),
                    default="off",
                    optional=True,
                    tooltip="off: the image as it is. stretch: to a square of size x size, as "
                    "EasyControl does with edges, depth, poses and styles. pad: to the same "
                    "square, but with the image whole in its middle and grey around it, as "
                    "EasyControl does with subjects. crop: to the same square, without what is "
                    "over at both ends of the longer side, as OminiControl does. The mask goes "
                    "along.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=4096,
                    step=16,
                    optional=True,
                    tooltip="Side of the square in pixels, EasyControl's cond_size: most LoRAs "
                    "were trained at 512. Not used with resize off.",
                ),
            ],
            outputs=[
                common.OminiCondition.Output(
                    "condition",
                    display_name="condition",
                    tooltip="Connect it to Apply Omini2 LoRA.",
                ),
                io.Image.Output(
                    display_name="image", tooltip="The image as it was encoded: resized, cropped."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        vae: Any,
        placement: str,
        delta_rows: int,
        delta_cols: int,
        position_scale: float,
        mask: Tensor | None = None,
        resize: str = "off",
        size: int = 512,
        **foreign: object,
    ) -> io.NodeOutput:
        require_known(foreign)
        # Text has an `encode` as well.
        right = hasattr(vae, "encode") and not isinstance(vae, str)
        require_kind("vae", vae, right, "VAE", "Load VAE")
        scale = position_scale, position_scale
        place = chosen_placement(placement, (delta_rows, delta_cols), scale)
        image, mask, fit = resized(image, mask, resize, size, images.lanczos)
        condition = encode_condition(image, vae.encode, place, mask)
        return io.NodeOutput(replace(condition, fit=fit), condition.pixels)


def placement_of(given: queued.Inputs) -> Placement:
    """Where a node of this kind puts its condition, as far as its queued inputs say."""
    rows, columns = (queued.constant(given, f"delta_{name}", 0) for name in ("rows", "cols"))
    scale = queued.constant(given, "position_scale", 1.0)
    kind = queued.constant(given, "placement", "aligned")
    return chosen_placement(kind, (rows, columns), (scale, scale))

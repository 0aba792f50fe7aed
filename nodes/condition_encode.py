"""Omini2 Condition Encode: an image becomes a condition."""

from comfy_api.latest import io
from torch import Tensor

from ..omini2_core.condition import PLACEMENTS, Placement, encode_condition
from .condition_type import OminiCondition


class ConditionEncode(io.ComfyNode):
    """Image and VAE in, OMINI2_CONDITION out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Omini2ConditionEncode",
            display_name="Omini2 Condition Encode",
            category="Omini2",
            description="Turns an image (edges, depth, a subject, a blurred or masked picture) "
            "into condition tokens for FLUX.1.",
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
                    options=list(PLACEMENTS),
                    default="aligned",
                    tooltip="Where the condition lies beside the picture. aligned: same place, "
                    "token by token (edges, depth). fit: stretched over the whole picture, "
                    "whatever its size. left, right, above, below: next to it (subjects: right "
                    "for subject_512, left for art styles). custom: moved by delta_rows and "
                    "delta_cols.",
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
            ],
            outputs=[
                OminiCondition.Output(
                    "condition",
                    display_name="condition",
                    tooltip="Connect it to Apply Omini2 LoRA.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        vae: object,
        placement: str,
        delta_rows: int,
        delta_cols: int,
        position_scale: float,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        place = Placement(placement, (delta_rows, delta_cols), (position_scale, position_scale))
        return io.NodeOutput(encode_condition(image, vae.encode, place, mask))

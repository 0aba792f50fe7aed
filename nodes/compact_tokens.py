"""Compact Tokens: fewer tokens for a condition."""

from comfy_api.latest import io
from torch import Tensor

from ..omini2_core.errors import Omini2Error, require_choice, require_known
from ..omini2_core.flux1 import numbers
from ..omini2_core.host import images, queued
from ..omini2_core.host.figures import compact_figures
from ..omini2_core.host.integration import require_own_size
from ..omini2_core.host.queued_sizes import condition_hw, pictures_with_condition
from ..omini2_core.tokens import compact
from ..omini2_core.tokens.compact import (
    PRUNE,
    compress,
    compressed,
    draw_tokens,
    integrate,
    require_on_picture,
    tokens_with_content,
)
from ..omini2_core.tokens.condition import Condition, require_condition
from ..omini2_core.tokens.resize import tokens_under
from . import common
from .condition_encode import placement_of


class CompactTokens(io.ComfyNode):
    """Compression, pruning and token integration of one condition."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return common.schema(
            node_id="Omini2CompactTokens",
            display_name="Compact Tokens",
            category="Omini2",
            description="Makes a condition cheaper by giving it fewer tokens: a smaller image "
            "(compression), without its empty parts (prune), or, for inpainting and "
            "outpainting, with the known part of the picture taken out of the denoising "
            "(token_integration).",
            search_aliases=[
                "ominicontrol",
                "inpaint",
                "outpaint",
                "mask",
                "compress",
                "prune",
                "fewer tokens",
                "token integration",
            ],
            inputs=[
                common.condition(),
                common.compression("condition", ", 0.25 a sixteenth."),
                io.Boolean.Input(
                    "position_correcting",
                    default=True,
                    tooltip="Spreads the compressed tokens over the same part of the picture as "
                    "before. Switch it off only to see what it does.",
                ),
                io.Combo.Input(
                    "prune",
                    options=list(PRUNE),
                    default="off",
                    tooltip="empty: drops tokens that show nothing but the background, for "
                    "edges, poses and segmentation. mask: keeps what the mask touches.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="For prune empty: how much a pixel has to differ from the "
                    "background, 0 to 1, to count as content.",
                ),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="For prune: keeps this many tokens more around what is kept.",
                ),
                io.Boolean.Input(
                    "token_integration",
                    default=False,
                    tooltip="Inpainting and outpainting: only what the mask marks is denoised, "
                    "everything else is taken from the condition as it is. Needs a condition of "
                    "the picture's own size, placed aligned.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="With prune mask: what to keep. With token_integration: what to "
                    "paint. Widened to whole tokens of 16x16 pixels. It may be drawn on the image "
                    "before or after Condition Encode has resized it.",
                ),
                io.Boolean.Input(
                    "shift_schedule",
                    default=True,
                    optional=True,
                    tooltip="For token_integration on FLUX.1-dev: the noise schedule is shifted "
                    "for the number of painted tokens, as in OminiControl2. Switch it off to "
                    "keep the model's own, or one set by ModelSamplingFlux.",
                ),
            ],
            outputs=[
                common.OminiCondition.Output(
                    display_name="condition", tooltip="Connect it to Apply Omini2 LoRA."
                ),
                io.Image.Output(
                    display_name="tokens",
                    tooltip="The condition image; dropped tokens are dark and tinted.",
                ),
                io.Int.Output(display_name="count", tooltip="The number of tokens kept."),
            ],
        )

    @classmethod
    def validate_inputs(cls, token_integration: bool | None) -> bool | str:
        """Says at queueing what would otherwise be said in the run."""
        given, node = queued.inputs(), queued.current()
        compression, prune = (
            queued.constant(given, name, default)
            for name, default in (("compression", 1.0), ("prune", "off"))
        )
        integrates = token_integration is True

        def check() -> None:
            _check(compression, prune, integrates, given.get("mask"))
            encode = queued.behind("condition", "Omini2ConditionEncode")
            if integrates and encode:
                require_on_picture(placement_of(encode))
            hw = None if node is None else condition_hw(node)
            if node is None or hw is None:
                return
            compressed(hw, compression)
            for height, width in pictures_with_condition(node) if integrates else ():
                require_own_size(hw, height, width)

        return not given or queued.verdict("token_integration", check)

    @classmethod
    def execute(
        cls,
        condition: Condition,
        compression: float,
        position_correcting: bool,
        prune: str,
        threshold: float,
        grow: int,
        token_integration: bool,
        mask: Tensor | None = None,
        shift_schedule: bool = True,
        **foreign: object,
    ) -> io.NodeOutput:
        require_known(foreign)
        require_condition(condition)
        before = condition.token_count
        _check(compression, prune, token_integration, mask)
        condition = compress(condition, compression, position_correcting, images.resize)
        condition = _pruned(condition, prune, threshold, grow, mask)
        if token_integration:
            paint = tokens_under(mask, condition)
            if not paint.any():
                raise Omini2Error("mask: it marks nothing to paint; draw on the part to paint.")
            condition = integrate(condition, paint, shift_schedule)
        return io.NodeOutput(
            condition,
            draw_tokens(condition),
            condition.token_count,
            ui={"omini2": [compact_figures(before, condition, numbers.KV_BYTES_PER_TOKEN)]},
        )


def _check(compression: float, prune_by: str, token_integration: bool, mask: object) -> None:
    require_choice("prune", prune_by, PRUNE)
    if mask is None and (token_integration or prune_by == "mask"):
        raise Omini2Error(
            f"mask: {'token_integration' if token_integration else 'prune mask'} needs one; "
            "connect a mask, or switch it off."
        )
    if token_integration and compression != 1.0:
        raise Omini2Error(
            "compression: token_integration needs the condition at the picture's own size; set "
            "compression to 1."
        )
    if token_integration and prune_by == "mask":
        raise Omini2Error(
            "prune: with token_integration the mask marks what to paint, so it can't mark what "
            "to keep as well; set prune to off or empty."
        )


def _pruned(
    condition: Condition, by: str, threshold: float, grow: int, mask: Tensor | None
) -> Condition:
    if by == "off":
        return condition
    if by == "empty":
        return compact.prune(condition, tokens_with_content(condition.pixels, threshold, grow))
    keep = tokens_under(mask, condition)
    return compact.prune(condition, compact.grown(keep, grow))

"""Omini2 Keep Unchanged: an edit's result with the reference's own pixels where nothing changed."""

import torch
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..omini2_core.errors import Omini2Error, require_known
from ..omini2_core.tokens.drift import drift
from ..omini2_core.tokens.unchanged import (
    MAX_FEATHER,
    Kept,
    changed_tokens,
    keep_unchanged,
    require_same_size,
)
from . import common


class KeepUnchanged(io.ComfyNode):
    """Proves what an edit left alone, and measures how far the rest has moved."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return common.schema(
            node_id="Omini2KeepUnchanged",
            display_name="Omini2 Keep Unchanged",
            category="Omini2",
            description="Puts the reference image's own pixels, bit for bit, where an edit left "
            "the latent as it was, and says how much was changed and how far the picture has "
            "moved. Behind VAE Decode, after Omini2 Spot Edit or any other edit.",
            search_aliases=[
                "spotedit",
                "composite",
                "paste back",
                "stitch",
                "keep background",
                "drift",
                "pixel shift",
                "compare",
                "edit",
                "inpaint",
            ],
            inputs=[
                io.Image.Input("image", tooltip="The result, from VAE Decode."),
                io.Latent.Input("samples", tooltip="What went into that VAE Decode."),
                io.Image.Input(
                    "reference",
                    tooltip="The image that was edited, as it went into VAE Encode for "
                    "ReferenceLatent; behind inpainting, the image of Condition Encode.",
                ),
                io.Vae.Input("vae", tooltip="The same VAE."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What may have changed: everything outside of it is the reference's. "
                    "Without a mask the latent says it.",
                ),
                io.Int.Input(
                    "feather",
                    default=8,
                    min=0,
                    max=MAX_FEATHER,
                    optional=True,
                    tooltip="Pixels over which the two are mixed, from the border into what was "
                    "changed.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="The result; where nothing was changed, the reference's own pixels.",
                ),
                io.Mask.Output(display_name="mask", tooltip="What was changed."),
                io.String.Output(
                    display_name="report",
                    tooltip="The share that was changed, and the result's shift and zoom against "
                    "the reference, in pixels.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        samples: dict[str, Tensor],
        reference: Tensor,
        vae: VAE,
        mask: Tensor | None = None,
        feather: int = 8,
        **foreign: object,
    ) -> io.NodeOutput:
        require_known(foreign)
        latent = require_same_size(image, samples, reference)
        known = vae.encode(reference[..., :3])
        if known.shape[1:] != latent.shape[1:]:
            raise Omini2Error(
                f"vae: it gives latents of shape {tuple(known.shape[1:])} for the reference and "
                f"samples are {tuple(latent.shape[1:])}; connect the VAE that decodes the image."
            )
        size = image.shape[1], image.shape[2]
        changed = changed_tokens(latent, known, size)
        kept = keep_unchanged(image, reference, changed, mask, feather)
        return io.NodeOutput(kept.pixels, kept.changed.float(), report(kept, image, reference))


def report(kept: Kept, image: Tensor, reference: Tensor) -> str:
    """A line for each picture: how much of it was changed, and how far it has moved."""
    lines = []
    for i, (changed, result) in enumerate(zip(kept.changed, image, strict=True)):
        whole = bool(changed.all())
        looked_at = torch.ones_like(changed) if whole else ~changed
        found = drift(result, reference[i % len(reference)], looked_at)
        name = f"picture {i + 1}: " if len(image) > 1 else ""
        share = f"{name}{100 * float(changed.float().mean()):.1f} % changed"
        where = "the whole picture" if whole else "the rest"
        if found is None:
            lines.append(f"{share}; {where} shows too little to measure a shift.")
            continue
        height, width = changed.shape
        lines.append(
            f"{share}; {where} moved by {found.right:+.2f} px to the right and {found.down:+.2f} "
            f"px down, zoom {100 * found.zoom:.2f} % ({found.at_edge(width, height):.2f} px at "
            f"the corners), measured at {found.places} places."
        )
    return "\n".join(lines)

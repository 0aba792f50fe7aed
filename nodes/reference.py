"""Omini2 Reference: an image becomes a reference of an editing model."""

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..omini2_core.errors import require_known, warn
from ..omini2_core.host import images, queued
from ..omini2_core.host.attach import get_setup, with_setup
from ..omini2_core.host.reference_encode import encode_reference, require_fit, target_size
from ..omini2_core.host.reference_layout import require_rows_to_move
from ..omini2_core.host.reference_settings import (
    ReferenceSettings,
    require_prompt,
    require_settings,
    with_reference,
    zeroed,
)
from ..omini2_core.host.references import require_alone, require_served
from ..omini2_core.tokens.reference import FIT, reference_image
from . import common


class Reference(io.ComfyNode):
    """Image, VAE and prompts in, prompts with a reference and the MODEL that knows of it out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        start, end = common.start_and_end("reference")
        return common.schema(
            node_id="Omini2Reference",
            display_name="Omini2 Reference",
            category="Omini2",
            description="Gives an editing model (FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit, Krea 2) "
            "a reference image, in place of VAE Encode and Reference Latent: with fewer tokens, "
            "with a part of it only, more or less strongly, or for a part of sampling.",
            search_aliases=[
                "reference",
                "reference latent",
                "reference strength",
                "redux",
                "ipadapter",
                "kontext",
                "edit",
                "klein",
                "qwen",
                "krea",
                "compress",
                "fewer tokens",
                "speed up",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="An editing model. Connect the model output to the sampler or to the "
                    "next node: what is set here is done there.",
                ),
                io.Conditioning.Input("positive", tooltip="The prompt to add the reference to."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input(
                    "image",
                    tooltip="The reference. One token is 16x16 pixels, so 1024x1024 makes 4096, as "
                    "many as a picture of that size has, and all run through the model.",
                ),
                common.compression(
                    "reference", ". No editing model was trained on this; look at the result."
                ),
                io.Boolean.Input(
                    "position_correcting",
                    default=True,
                    tooltip="Spreads the tokens of a compressed reference over the place that it "
                    "had before. Off: the model places it as the small image that it is.",
                ),
                common.scale("strength", "reference", "leaves it out", "as the model does"),
                start,
                end,
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Gets the same reference. Needed where cfg is above 1.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Keeps only the tokens of the reference that the mask touches. The "
                    "others are not computed.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(FIT),
                    default="off",
                    optional=True,
                    tooltip="off: the image as it is. picture: scaled and cropped around the "
                    "centre to the size of the picture, for which latent has to be connected; "
                    "models lay a reference on the picture from the upper left (Qwen-Image-Edit "
                    "from the centre), so another size is a shift. megapixel: to about 1024x1024 "
                    "pixels in its own shape, which these models know best.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The latent that goes to the sampler. Only its size is used, with fit "
                    "picture.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The same model, which heeds what is set here."
                ),
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt with the reference."
                ),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The negative prompt with the reference. Without one connected the "
                    "positive one zeroed out, as Conditioning Zero Out gives it.",
                ),
            ],
            wants_id=True,
            wants_graph=True,
        )

    @classmethod
    def validate_inputs(cls, fit: str | None) -> bool | str:
        """Says at queueing what would otherwise be said once a model is loaded."""
        given = queued.inputs()
        known = fit is not None and given
        return not known or queued.verdict("fit", lambda: require_fit(fit, given.get("latent")))

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list[Any],
        vae: Any,
        image: Tensor,
        compression: float,
        position_correcting: bool,
        strength: float,
        start_percent: float,
        end_percent: float,
        negative: list[Any] | None = None,
        mask: Tensor | None = None,
        fit: str = "off",
        latent: dict[str, Any] | None = None,
        **foreign: object,
    ) -> io.NodeOutput:
        require_known(foreign)
        family = require_served(model)
        for name, prompt in (("positive", positive), ("negative", negative)):
            if prompt is not None or name == "positive":
                require_prompt(name, prompt)
        require_settings(strength, start_percent, end_percent)
        target = target_size(fit, image, latent, family, model)
        made = reference_image(image, mask, target, compression, images.resize, images.lanczos)
        whole = made.whole if position_correcting else None
        module = model.model.diffusion_model
        side = family.patch(module)
        settings = ReferenceSettings(
            encode_reference(made, vae, family, model),
            whole and (whole[0] * side, whole[1] * side),
            made.keep,
            strength,
            start_percent,
            end_percent,
        )
        if settings.moves_rows:
            require_rows_to_move([settings], module, family)
        if settings.acts:
            require_alone(model, "model", "leave this node's settings at their defaults")
            if not common.leads_on(cls, 0):
                warn(
                    "model: nothing is connected to this output of Omini2 Reference, so what is "
                    "set there is not done; connect it to the sampler or the next node."
                )
        negative = zeroed(positive) if negative is None else negative
        if strength == 0:
            return io.NodeOutput(model, positive, negative)
        positive, negative = (with_reference(each, settings) for each in (positive, negative))
        return io.NodeOutput(with_setup(model, get_setup(model)), positive, negative)

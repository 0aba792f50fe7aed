"""Omini2 Spot Edit: an edit computes only what it changes."""

from dataclasses import replace

from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..omini2_core.engine.spot import AUTO, FUSION, SELECT, SpotEdit
from ..omini2_core.errors import Omini2Error, require_known
from ..omini2_core.host import queued
from ..omini2_core.host.attach import get_setup, with_setup
from ..omini2_core.host.decoder_features import require_decoder
from ..omini2_core.host.queued_sizes import pictures_with_reference
from ..omini2_core.host.setup import Spot
from ..omini2_core.host.spot_run import require_editing, require_same_place
from ..omini2_core.tokens.encode import require_mask
from . import common


class SpotEditNode(io.ComfyNode):
    """Leaves out of an editing model what agrees with its reference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return common.schema(
            node_id="Omini2SpotEdit",
            display_name="Omini2 Spot Edit",
            category="Omini2",
            description="Edits only what has to change: after a few full steps, tokens that "
            "already agree with the prompt's reference image are left out of the computation, and "
            "at the end they are the reference's. Faster, and nothing drifts where nothing was "
            "asked for. Or paint a mask and edit there only.",
            search_aliases=[
                "spotedit",
                "kontext",
                "qwen edit",
                "edit",
                "inpaint",
                "mask",
                "local edit",
                "keep background",
                "drift",
                "faster",
                "speed up",
                "skip tokens",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="FLUX.1 Kontext, Qwen-Image-Edit or FLUX.2, as you load it."
                ),
                io.Combo.Input(
                    "select",
                    options=list(SELECT),
                    default="perceptual",
                    tooltip="How tokens are found that need no edit. perceptual: by what the VAE's "
                    "decoder makes of them, as in SpotEdit; needs the vae. latent: by their "
                    "values' differences to the fourth power. cosine: by their values' likeness. "
                    "mask: those outside of the mask, from the first step on.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.2,
                    min=-1.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="A token with a lower score needs no edit; with cosine, one with a "
                    "higher. More leaves more out. 0.2 is SpotEdit's for FLUX.1 Kontext, 0.15 for "
                    "Qwen-Image-Edit, both with perceptual. No meaning with mask.",
                ),
                io.Int.Input(
                    "full_steps",
                    default=4,
                    min=1,
                    max=1000,
                    tooltip="Steps at the beginning that compute the whole picture. With mask: "
                    "that compute the reference.",
                ),
                io.String.Input(
                    "reset_steps",
                    default="auto",
                    tooltip="Further such steps, which take up again what was left out. auto: "
                    "after 26, 44 and 62 % of the steps. none, or a list counted from 0, as in "
                    "13, 22, 31.",
                ),
                io.Combo.Input(
                    "fusion",
                    options=list(FUSION),
                    default="off",
                    tooltip="What stands for a token that is left out. off: itself when it was "
                    "computed last, as SpotEdit's code has it. once: it goes over into the "
                    "reference's as noise falls. recursive: step upon step, as the paper has it. "
                    "No meaning with mask.",
                ),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Widens what is edited by this many tokens of 16x16 pixels.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="The model's own; select perceptual needs it."
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Edit here. With select mask nothing else is edited; otherwise these "
                    "tokens are always computed. Widened to whole tokens of 16x16 pixels.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="Connect it to KSampler or any other sampler."
                )
            ],
            wants_id=True,
        )

    @classmethod
    def validate_inputs(cls, reset_steps: str | None) -> bool | str:
        """Says at queueing what would otherwise be said once a model is loaded."""
        given = queued.inputs()
        select = queued.constant(given, "select", None)

        def check() -> None:
            SpotEdit(reset_steps=reset_steps or AUTO)
            _require_vae(select, given.get("vae"))
            if select == "mask" and "mask" not in given:
                _require_painted(select, None)
            node = queued.current()
            for reference, picture in () if node is None else pictures_with_reference(node):
                require_same_place(reference, picture)

        return not given or queued.verdict("reset_steps", check)

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        select: str,
        threshold: float,
        full_steps: int,
        reset_steps: str,
        fusion: str,
        grow: int,
        vae: VAE | None = None,
        mask: Tensor | None = None,
        **foreign: object,
    ) -> io.NodeOutput:
        require_known(foreign)
        edit = SpotEdit(select, threshold, full_steps, reset_steps, fusion, grow)
        require_editing(model)
        _require_vae(select, vae)
        if select == "perceptual":
            require_decoder(vae, model.model.latent_format.latent_channels)
        _require_painted(select, mask)
        spot = Spot(edit, vae, mask, node=common.node_id(cls))
        return io.NodeOutput(with_setup(model, replace(get_setup(model), spot=spot)))


def _require_vae(select: str | None, vae: object) -> None:
    if select == "perceptual" and vae is None:
        raise Omini2Error(
            "vae: select perceptual compares what the VAE's decoder makes of the picture; "
            "connect the model's VAE, or set select to latent."
        )


def _require_painted(select: str, mask: Tensor | None) -> None:
    """Refuses a mask that can't say what is edited."""
    painted = mask is not None and bool((require_mask(mask) > 0.5).any())
    if select == "mask" and not painted:
        what = "needs one" if mask is None else "marks nothing to edit"
        raise Omini2Error(
            f"mask: {'select mask ' if mask is None else 'it '}{what}; paint the part to edit, or "
            "choose another select."
        )

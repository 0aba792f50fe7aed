"""Apply Omini2 LoRA: a condition and its LoRA are added to a model."""

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..omini2_core.errors import require_known
from ..omini2_core.files import fingerprint
from ..omini2_core.host import queued
from ..omini2_core.host.attach import add_branch
from ..omini2_core.host.folders import lora_path
from ..omini2_core.host.loras import chosen_lora, require_choosable
from ..omini2_core.host.model import require_flux1
from ..omini2_core.host.setup import ATTENTION, Branch
from ..omini2_core.lora.family import AUTO, FAMILY_CHOICES, NO_LORA
from ..omini2_core.tokens.condition import Condition, require_condition
from . import common


class ApplyLora(io.ComfyNode):
    """One more condition branch on a clone of the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return common.schema(
            node_id="Omini2ApplyLoRA",
            display_name="Apply Omini2 LoRA",
            category="Omini2",
            description="Lets a condition steer FLUX.1 through a condition LoRA, which acts on "
            "that condition's tokens only (IEAP's on the picture too). Chain several for several "
            "conditions. Don't load condition LoRAs with Load LoRA: that applies them to the whole "
            "model.",
            search_aliases=[
                "ominicontrol",
                "easycontrol",
                "omniconsistency",
                "ieap",
                "unicombine",
                "omnipaint",
                "photodoodle",
                "control",
                "controlnet",
                "reference",
                "subject",
                "style transfer",
                "pose",
                "canny",
                "edges",
                "depth",
                "redux",
                "ipadapter",
                "condition lora",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A FLUX.1 model: dev, schnell or Krea."),
                common.condition(),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_LORA, *folder_paths.get_filename_list("loras")],
                    tooltip="The condition LoRA, from ComfyUI's loras folder. (none): for "
                    "PhotoDoodle, whose LoRAs all go through Load LoRA.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of the LoRA on the condition's tokens, EasyControl's "
                    "lora_weight. Leave it at 1 and use condition_scale for a weaker or stronger "
                    "condition.",
                ),
                common.condition_scale("as trained and costs nothing extra"),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTION),
                    default="auto",
                    tooltip="joint: the condition also looks at text and picture; all "
                    "OminiControl LoRAs published so far were trained so. independent: it looks "
                    "only at itself, so it has to be computed only once; EasyControl's LoRAs were "
                    "trained so. auto: what the LoRA file says, else joint.",
                ),
                *common.start_and_end(),
                io.Combo.Input(
                    "family",
                    options=list(FAMILY_CHOICES),
                    default=AUTO,
                    optional=True,
                    tooltip="Whose rules the condition follows: time, guidance, where the LoRA "
                    "acts, whether ordinary LoRAs act on the condition too. auto: by the file's "
                    "name and keys, or as it says itself; a warning tells where that leaves a "
                    "doubt.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model with this condition; connect it to the next node or to "
                    "KSampler.",
                )
            ],
            wants_id=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: object) -> str:
        """Another file under the same name is loaded anew.

        Args:
            lora_name: None where another node gives it, which then says itself what is new.
        """
        found: str = "" if lora_name is None else fingerprint(lora_path(lora_name))
        return found

    @classmethod
    def validate_inputs(cls, lora_name: str | None) -> bool | str:
        """Says at queueing what would otherwise be said once a model is loaded."""

        def check(name: str) -> None:
            given = queued.inputs()
            family = queued.constant(given, "family", AUTO)
            require_choosable(name, family, queued.constant(given, "attention", "auto"))
            common.require_share(given)

        return lora_name is None or queued.verdict("lora_name", lambda: check(lora_name))

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        condition: Condition,
        lora_name: str,
        strength: float,
        condition_scale: float,
        attention: str,
        start_percent: float,
        end_percent: float,
        family: str = AUTO,
        **foreign: object,
    ) -> io.NodeOutput:
        require_known(foreign)
        require_condition(condition)
        require_flux1(model)
        found, lora = chosen_lora(model, lora_name, family)
        branch = Branch(
            condition=condition,
            lora=lora,
            strength=strength,
            condition_scale=condition_scale,
            attention=attention,
            start_percent=start_percent,
            end_percent=end_percent,
            node=common.node_id(cls),
            usage=None if found is None else found.usage,
        )
        if found is not None:
            found.warn_about(condition, attention)
        return io.NodeOutput(add_branch(model, branch))

"""Omini2 Train LoRA: trains a condition LoRA from the graph editor."""

from typing import Any

import comfy.utils
from comfy_api.latest import io, ui
from PIL import Image

from ..omini2_core.errors import Omini2Error
from ..omini2_core.training.choices import (
    CONDITIONS,
    NONE,
    bases,
    picture_folders,
)
from . import common

PACKAGES = "diffusers peft accelerate prodigyopt pyyaml pydantic kornia"


class TrainLora(io.ComfyNode):
    """The trainer of ``python -m omini2_core.training`` with the options that matter most."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        folders = picture_folders()
        return common.schema(
            node_id="Omini2TrainLoRA",
            display_name="Omini2 Train LoRA",
            category="Omini2/training",
            description="Trains a condition LoRA for FLUX.1 on a folder of pictures with captions "
            "(a .txt file beside each). Cancelling keeps the last checkpoint; running the same "
            "settings again goes on from it. Every option: docs/training.md and "
            "python -m omini2_core.training.",
            is_output_node=True,
            search_aliases=["ominicontrol", "train control", "finetune", "condition lora"],
            inputs=[
                io.Clip.Input("clip", tooltip="FLUX.1's text encoders, for the captions."),
                io.Vae.Input("vae", tooltip="FLUX.1's VAE, for the pictures."),
                io.Combo.Input(
                    "base",
                    options=bases(),
                    tooltip="The model to train for, from ComfyUI's diffusion_models folder. It "
                    "is loaded a second time, apart from the graph's own.",
                ),
                io.Combo.Input(
                    "images",
                    options=folders or [NONE],
                    tooltip="A folder inside ComfyUI's input folder: pictures, and for each a .txt "
                    "file of the same name with its caption.",
                ),
                io.Combo.Input(
                    "condition",
                    options=list(CONDITIONS),
                    tooltip="What to condition on. Made from the pictures themselves: canny "
                    "(edges), grey (colouring), blur (deblurring), mask (a hidden rectangle), "
                    "inpainting (token integration). folder: a second folder of condition "
                    "pictures with the same file names, for depth, poses, subjects.",
                ),
                io.Combo.Input(
                    "condition_folder",
                    options=[NONE, *folders],
                    default=NONE,
                    tooltip="With condition: folder, where the condition pictures are.",
                ),
                io.Combo.Input(
                    "attention",
                    options=["independent", "joint"],
                    default="independent",
                    tooltip="independent: the condition looks only at itself, so it is computed "
                    "once per picture and never again. joint: it also looks at text and picture, "
                    "as all published OminiControl LoRAs do.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=16,
                    tooltip="Width and height that pictures are trained at.",
                ),
                io.Float.Input(
                    "compression",
                    default=1.0,
                    min=0.0625,
                    max=1.0,
                    step=0.0625,
                    tooltip="Side of the condition over the picture's. 0.5 trains with a quarter "
                    "of the tokens, for use with Compact Tokens.",
                ),
                io.Int.Input(
                    "delta_rows",
                    default=0,
                    min=-512,
                    max=512,
                    tooltip="Moves the condition down by so many tokens of 16 pixels.",
                ),
                io.Int.Input(
                    "delta_cols",
                    default=0,
                    min=-512,
                    max=512,
                    tooltip="Moves the condition to the right by so many tokens. For subjects: "
                    "size / 16.",
                ),
                io.Int.Input(
                    "steps", default=3000, min=1, max=1000000, tooltip="Training steps in all."
                ),
                io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="Pictures per step."),
                io.Int.Input(
                    "rank",
                    default=4,
                    min=1,
                    max=256,
                    tooltip="Rank of the LoRA; the published ones have 4 to 16.",
                ),
                io.Combo.Input(
                    "optimizer",
                    options=["prodigy", "adamw"],
                    default="prodigy",
                    tooltip="prodigy finds its own learning rate.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    tooltip="For adamw only.",
                ),
                io.Combo.Input(
                    "quantize",
                    options=["none", "nf4", "int8"],
                    default="none",
                    tooltip="Keeps the base in 4 or 8 bits while training, for smaller cards; "
                    "needs bitsandbytes.",
                ),
                io.Int.Input(
                    "checkpoint_every",
                    default=250,
                    min=1,
                    max=100000,
                    tooltip="Steps after which all is saved; the most that can be lost.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, tooltip="Of the training."),
                io.String.Input(
                    "lora_name",
                    default="my_condition",
                    tooltip="Name of the file in the loras folder.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    tooltip="Go on from the last checkpoint of this name, if there is one.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="lora_name",
                    tooltip="The file in the loras folder. Press R to see it in Apply Omini2 LoRA.",
                ),
                io.Image.Output(display_name="loss_curve", tooltip="The smoothed loss, as drawn."),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, vae: Any, **values: Any) -> io.NodeOutput:
        try:
            # Only here: they take seconds to import, and who doesn't train needn't have them.
            from ..omini2_core.training import graph
        except ImportError as error:
            raise Omini2Error(
                f"Training needs a package that isn't there ({error.name}): install it into "
                f"ComfyUI's Python with python -m pip install {PACKAGES}, then restart ComfyUI."
            ) from error
        config = graph.config_for(values)
        bar = comfy.utils.ProgressBar(config.steps)

        def show(progress: Any, curve: Image.Image) -> None:
            if progress.stage == "train":
                bar.update_absolute(progress.step, config.steps, ("JPEG", curve, max(curve.size)))

        name, curve = graph.train_lora(config, clip, vae, show)
        return io.NodeOutput(name, curve, ui=ui.PreviewImage(curve, cls=cls))

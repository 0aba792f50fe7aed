"""Omini2 Train LoRA: trains a condition LoRA from the graph editor."""

from typing import Any

import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..omini2_core.errors import Omini2Error
from ..omini2_core.training.choices import (
    AUTO,
    CONDITIONS,
    DEMO_PICTURES,
    NONE,
    OPTIMIZERS,
    REFERENCES,
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
            "(a .txt file beside each). Cancelling keeps the last checkpoint; running it again "
            "goes on from there. Every option: docs/training.md and "
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
                    options=[DEMO_PICTURES, *folders],
                    tooltip="A folder inside ComfyUI's input folder: pictures, and for each a .txt "
                    "file of the same name with its caption. the demo pictures: twelve that come "
                    "with the extension, for the demo model.",
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
                common.advanced(
                    io.Combo.Input(
                        "attention",
                        options=["independent", "joint"],
                        default="independent",
                        tooltip="independent: the condition looks only at itself, so it is "
                        "computed once per picture and never again. joint: it also looks at text "
                        "and picture, as all published OminiControl LoRAs do.",
                    )
                ),
                common.advanced(
                    io.Int.Input(
                        "size",
                        default=0,
                        min=0,
                        max=2048,
                        step=16,
                        tooltip="Width and height that pictures are trained at. 0: 256 for the "
                        "demo model, 512 for FLUX.1.",
                    )
                ),
                common.advanced(
                    io.Float.Input(
                        "compression",
                        default=1.0,
                        min=0.0625,
                        max=1.0,
                        step=0.0625,
                        tooltip="Side of the condition over the picture's. 0.5 trains with a "
                        "quarter of the tokens, for use with Compact Tokens.",
                    )
                ),
                common.advanced(
                    io.Int.Input(
                        "delta_rows",
                        default=0,
                        min=-512,
                        max=512,
                        tooltip="Moves the condition down by so many tokens of 16 pixels.",
                    )
                ),
                common.advanced(
                    io.Int.Input(
                        "delta_cols",
                        default=0,
                        min=-512,
                        max=512,
                        tooltip="Moves the condition to the right by so many tokens. For "
                        "subjects: size / 16.",
                    )
                ),
                io.Int.Input(
                    "steps",
                    default=3000,
                    min=1,
                    max=1000000,
                    tooltip="Training steps in all; raise them to train a finished LoRA further.",
                ),
                common.advanced(
                    io.Int.Input(
                        "batch_size", default=1, min=1, max=256, tooltip="Pictures per step."
                    )
                ),
                common.advanced(
                    io.Int.Input(
                        "rank",
                        default=4,
                        min=1,
                        max=256,
                        tooltip="Rank of the LoRA; the published ones have 4 to 16.",
                    )
                ),
                common.advanced(
                    io.Combo.Input(
                        "optimizer",
                        options=list(OPTIMIZERS),
                        default=AUTO,
                        tooltip="auto: adamw for the demo model, and prodigy for FLUX.1, as the "
                        "original has it. prodigy finds its own learning rate.",
                    )
                ),
                common.advanced(
                    io.Float.Input(
                        "learning_rate",
                        default=0.0,
                        min=0.0,
                        max=1.0,
                        step=1e-7,
                        tooltip="For adamw only. 0: 0.001 for the demo model, 0.0001 for FLUX.1.",
                    )
                ),
                common.advanced(
                    io.Combo.Input(
                        "quantize",
                        options=["none", "nf4", "int8"],
                        default="none",
                        tooltip="Keeps the base in 4 or 8 bits while training, for smaller cards; "
                        "needs bitsandbytes.",
                    )
                ),
                common.advanced(
                    io.Int.Input(
                        "checkpoint_every",
                        default=250,
                        min=1,
                        max=100000,
                        tooltip="Steps after which all is saved; the most that can be lost.",
                    )
                ),
                common.advanced(
                    io.Int.Input(
                        "seed",
                        default=0,
                        min=0,
                        max=2**32 - 1,
                        tooltip="Of the training. A run that goes on keeps the one that it was "
                        "begun with.",
                    )
                ),
                io.String.Input(
                    "lora_name",
                    default="my_condition",
                    tooltip="Name of the file in the loras folder.",
                ),
                common.advanced(
                    io.Boolean.Input(
                        "resume",
                        default=True,
                        tooltip="Go on from the last checkpoint of this name, if there is one.",
                    )
                ),
                common.advanced(
                    io.Int.Input(
                        "sample_every",
                        default=100,
                        min=0,
                        max=100000,
                        optional=True,
                        tooltip="Steps after which pictures are drawn with the LoRA as it is, and "
                        "shown on the node between condition and original. 0: none.",
                    )
                ),
                common.advanced(
                    io.Combo.Input(
                        "references",
                        options=list(REFERENCES),
                        default="off",
                        optional=True,
                        tooltip="Trains an edit LoRA, for Load LoRA: the pictures are what the "
                        "condition pictures (condition: folder) should become, the captions are "
                        "the instructions. joint: the reference is computed as the model does, at "
                        "every step. isolated: it sees itself only, so that Condition Cache "
                        "computes it once without any difference. attention has no meaning then.",
                    )
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="lora_name",
                    tooltip="The file in the loras folder. Press R to see it in Apply Omini2 LoRA.",
                ),
                io.Image.Output(display_name="loss_curve", tooltip="The smoothed loss, as drawn."),
                common.LoraChoice.Output(
                    display_name="lora",
                    tooltip="The same file for the input lora_name of Apply Omini2 LoRA: connect "
                    "the two, and a graph trains first and then draws with what it has trained.",
                ),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, vae: Any, **values: Any) -> io.NodeOutput:
        try:
            # Only here: they take seconds to import, and who doesn't train needn't have them.
            from ..omini2_core.training import graph, inputs
        except ImportError as error:
            raise Omini2Error(
                f"Training needs a package that isn't there ({error.name}): install it into "
                f"ComfyUI's Python with python -m pip install {PACKAGES}, then restart ComfyUI."
            ) from error
        config = inputs.config_for(values)
        bar = comfy.utils.ProgressBar(config.steps)

        def show(progress: Any, board: Image.Image | None) -> None:
            if progress.stage == "train":
                preview = board and ("JPEG", board, max(board.size))
                bar.update_absolute(progress.step, config.steps, preview)

        name, curve, board = graph.train_lora(config, clip, vae, show)
        shown = torch.from_numpy(np.asarray(board, dtype=np.float32) / 255)[None]
        return io.NodeOutput(name, curve, name, ui=ui.PreviewImage(shown, cls=cls))

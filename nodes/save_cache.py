"""Omini2 Save Cache: a condition's K/V as a file."""

from pathlib import Path
from typing import Any

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..omini2_core.cache import file as cache_file
from ..omini2_core.errors import Omini2Error, brief, require_known
from ..omini2_core.host import folders, queued
from ..omini2_core.host import saved as host_saved
from . import common


class SaveCache(io.ComfyNode):
    """Computes the K/V of one independent condition and writes them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return common.schema(
            node_id="Omini2SaveCache",
            display_name="Omini2 Save Cache",
            category="Omini2",
            description="Writes a condition's keys and values to output/omini2_caches, so that "
            "others can use the condition without its image and LoRA. For one independent "
            "condition.",
            is_output_node=True,
            search_aliases=["ominicontrol", "kv cache", "export condition", "reference character"],
            inputs=[
                io.Model.Input("model", tooltip="A model with one independent condition applied."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt that the keys and values are computed with. Another "
                    "prompt works later, but gives another picture than the condition itself "
                    "would, and a warning.",
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent of the picture's size. It matters only with placement "
                    "fit.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="condition",
                    tooltip="Start of the file's name; a number is added.",
                ),
                io.String.Input(
                    "description",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What it shows and how it is meant to be used; kept in the file.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None) -> bool | str:
        """Says at queueing what would otherwise be said once a model is loaded."""
        return filename_prefix is None or queued.verdict(
            "filename_prefix", lambda: _prefix(filename_prefix)
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: Any,
        latent_image: dict[str, Any],
        filename_prefix: str,
        description: str = "",
        **foreign: object,
    ) -> io.NodeOutput:
        require_known(foreign)
        prefix = f"{folders.FOLDER}/{_prefix(filename_prefix)}"
        output = folder_paths.get_output_directory()
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output)
        keys_values = host_saved.compute(model, positive, latent_image, description)
        file = f"{name}_{counter:05}_.safetensors"
        cache_file.save(keys_values, Path(folder) / file)
        return io.NodeOutput(ui={"text": [f"{subfolder}/{file}: {keys_values.tokens} tokens"]})


def _prefix(given: str) -> str:
    """A file name, maybe in folders of their own: it has to stay where caches are."""
    parts = given.replace("\\", "/").split("/") if isinstance(given, str) else [""]
    if not all(map(_is_name, parts)):
        raise Omini2Error(
            f"filename_prefix: {brief(given)} is no file name; use letters, digits, - and _, and / "
            "for folders."
        )
    return "/".join(parts)


def _is_name(part: str) -> bool:
    plain = part.isprintable() and not set(part) & set(':*?"<>|')
    return plain and 0 < len(part) <= 100 and part.strip(". ") != ""

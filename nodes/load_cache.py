"""Omini2 Load Cache: a condition from a file of K/V."""

import math
from functools import partial
from pathlib import Path

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..omini2_core.cache import file as cache_file
from ..omini2_core.engine.saved import require_picture
from ..omini2_core.errors import Omini2Error, brief, require_known
from ..omini2_core.files import fingerprint
from ..omini2_core.host import folders, identity, queued
from ..omini2_core.host.attach import add_saved
from ..omini2_core.host.queued_sizes import pictures_with_model
from ..omini2_core.host.setup import SavedBranch
from . import common


class LoadCache(io.ComfyNode):
    """One more condition on a clone of the model, without its image, LoRA and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return common.schema(
            node_id="Omini2LoadCache",
            display_name="Omini2 Load Cache",
            category="Omini2",
            description="Adds a condition that Omini2 Save Cache has written. It needs neither its "
            "image nor its LoRA, and is never computed; the model has to be the same.",
            search_aliases=["ominicontrol", "kv cache", "import condition", "reference character"],
            inputs=[
                io.Model.Input("model", tooltip="The FLUX.1 model that the file was saved with."),
                io.Combo.Input(
                    "cache_name",
                    options=folders.cache_names(),
                    tooltip="A file from models/omini2_caches or output/omini2_caches.",
                ),
                common.condition_scale("as trained"),
                *common.start_and_end(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with this condition."),
                io.String.Output(
                    display_name="description", tooltip="What the person who saved it wrote."
                ),
            ],
            wants_id=True,
        )

    @classmethod
    def fingerprint_inputs(cls, cache_name: str, **_: object) -> str:
        """Another file under the same name is loaded anew."""
        path = folder_paths.get_full_path(folders.FOLDER, cache_name)
        found: str = fingerprint(None if path is None else Path(path))
        return found

    @classmethod
    def validate_inputs(cls, cache_name: str | None) -> bool | str:
        """Says at queueing what would otherwise be said once a model is loaded."""

        def check(name: str) -> None:
            fitted = cache_file.fitted_to(_cache_path(name))
            common.require_share(queued.inputs())
            node = queued.current()
            if node is None or not _takes_part(node):
                return
            for height, width in pictures_with_model(node):
                require_picture(fitted, (math.ceil(height / 2), math.ceil(width / 2)))

        return cache_name is None or queued.verdict("cache_name", lambda: check(cache_name))

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        cache_name: str,
        condition_scale: float,
        start_percent: float,
        end_percent: float,
        **foreign: object,
    ) -> io.NodeOutput:
        require_known(foreign)
        fit = identity.fit_of(model)
        patched = partial(identity.with_ordinary, model, fit)
        keys_values = cache_file.load(_cache_path(cache_name), fit, patched)
        branch = SavedBranch(
            keys_values, condition_scale, start_percent, end_percent, common.node_id(cls)
        )
        return io.NodeOutput(add_saved(model, branch), keys_values.description)


def _takes_part(node: queued.Node) -> bool:
    """Whether a queued node's condition takes part in every step, for certain."""
    scale, start, end = map(node.constant, ("condition_scale", "start_percent", "end_percent"))
    return (scale or 0) > 0 and (start, end) == (0, 1)


def _cache_path(cache_name: str) -> Path:
    """The file, which has to be one that the host itself lists: a workflow is untrusted input."""
    path = None
    if cache_name in folders.cache_names():
        path = folder_paths.get_full_path(folders.FOLDER, cache_name)
    if path is None:
        raise Omini2Error(
            f"cache_name: there is no {brief(cache_name)} in models/{folders.FOLDER} or "
            f"output/{folders.FOLDER}; put the file there and press R to refresh the list."
        )
    return Path(path)

"""K/V to and from files: computing them through the host, what they fit, where the files lie."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sample
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from . import host
from .cache import CachePolicy
from .digest import digest
from .errors import Omini2Error, require_kind
from .host_model import require_flux1
from .run_branch import NO_MAP, Evaluation, rows_of
from .saved import EMPTY, IMAGE, Fit, Saved
from .setup import Branch, SavedBranch, Setup
from .store import Entry

FOLDER = "omini2_caches"
SAMPLES = 64  # numbers of each weight that a model is recognised by


def register_folder() -> None:
    """Lists saved K/V as the host lists models: from its models and its output folder."""
    for parent in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(FOLDER, str(Path(parent) / FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = paths, {".safetensors"}


def cache_names() -> list[str]:
    """The files that there are."""
    if FOLDER not in folder_paths.folder_names_and_paths:
        register_folder()
    names: list[str] = folder_paths.get_filename_list(FOLDER)
    return names


def fit_of(model: ModelPatcher) -> Fit:
    """What K/V have to agree with to be used with a model.

    Ordinary LoRAs don't count: they are kept off the conditions.

    Raises:
        Omini2Error: what is patched onto the model has no name that a file could tell.
    """
    flux = require_flux1(model)
    patches = [patch for patches in model.patches.values() for patch in patches]
    replaced = set(model.object_patches) - {"model_sampling"}
    if model.hook_patches or replaced or any(not _is_lora(patch) for patch in patches):
        raise Omini2Error(
            "model: its weights are merged or patched in a way that no file can describe; save the "
            "model with Save Checkpoint first and load that."
        )
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    blocks = len(flux.double_blocks) + len(flux.single_blocks)
    head_dim = flux.hidden_size // flux.num_heads
    return Fit(_weights_name(model), blocks, flux.num_heads, head_dim, str(dtype))


def _is_lora(patch: Any) -> bool:
    _, adapter, strength_model, _, function, *_ = patch
    plain = getattr(adapter, "name", None) == "lora" and strength_model == 1.0
    return plain and function is None


def _weights_name(model: ModelPatcher) -> str:
    """A few numbers of every weight, as it is without patches: another model has others.

    The parameters themselves: a quantised model's state dict can hold more than it has.
    """
    parts: list[Tensor | str] = []
    for name, parameter in sorted(model.model.diffusion_model.named_parameters()):
        key = f"diffusion_model.{name}"
        kept = model.backup.get(key)
        flat = (parameter if kept is None else kept.weight).detach().flatten()
        parts += [key, flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]]
    return digest(parts)


def compute(model: ModelPatcher, positive: Any, latent: dict[str, Any], description: str) -> Saved:
    """The K/V of a model's one condition, computed as a run with this prompt would.

    Args:
        latent: the host's LATENT, for the size of the picture.

    Raises:
        Omini2Error: no condition or several, or one whose K/V belong to a single picture.
    """
    require_flux1(model)
    samples = latent.get("samples") if isinstance(latent, dict) else None
    right = isinstance(samples, Tensor) and samples.ndim == 4
    require_kind("latent_image", latent, right, "latent image", "Empty Latent Image")
    prompt = isinstance(positive, list) and positive and all(map(_is_prompt, positive))
    require_kind("positive", positive, bool(prompt), "conditioning", "CLIP Text Encode")
    setup = host.get_setup(model)
    branch = _one_branch(setup)
    fit = fit_of(model)
    calls: list[Evaluation] = []
    entries: dict[str, Entry] = {}

    def capture(call: Evaluation, entry: Entry) -> None:
        if call.axis_map != NO_MAP:
            raise Omini2Error(
                "model: its RoPE options move positions, which saved K/V can't follow; take the "
                "node that sets them out of the graph."
            )
        calls.append(call)
        entries[EMPTY if call.empty else IMAGE] = entry

    storage = "model" if setup.policy is None else setup.policy.storage
    policy = CachePolicy("once", storage=storage, keep_on="gpu")
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])[:1]
    # Nothing is kept of this run: its K/V go into the file.
    once = replace(setup, branches=(branch,), policy=policy, capture=capture)
    try:
        comfy.sample.sample(
            host.with_setup(model, once), torch.zeros_like(samples), 1, 1.0, "euler", "simple",
            positive, positive, samples, disable_pbar=True,
        )  # fmt: skip
    except host.Captured:
        pass
    call = calls[0]
    follows = branch.lora.family.branch_guidance is None and call.guidance is not None
    return Saved(
        fit=fit,
        tokens=branch.condition.token_count,
        picture_hw=call.picture_hw if branch.condition.placement.kind == "fit" else None,
        description=description,
        lora=branch.lora.name,
        pooled=rows_of(call.pooled, range(1)),
        guidance=float(call.guidance[0]) if follows and call.guidance is not None else None,
        entries=entries,
    )


def _is_prompt(entry: Any) -> bool:
    return len(entry) == 2 and isinstance(entry[0], Tensor) if isinstance(entry, list) else False


def _one_branch(setup: Setup) -> Branch:
    if len(setup.branches) != 1 or setup.saved:
        count = len(setup.branches) + len(setup.saved)
        raise Omini2Error(
            f"model: it has {count} conditions and a file holds one; connect a model with just one "
            "Apply Omini2 LoRA node."
        )
    branch = setup.branches[0]
    if branch.joint:
        raise Omini2Error(
            "model: a joint condition looks at the picture, so its K/V fit no other; use a LoRA "
            "trained for independent conditions, or set attention to independent."
        )
    if len(branch.condition.latent) > 1 or branch.condition.paint is not None:
        raise Omini2Error(
            "model: the condition holds several images or is a token integration; encode a single "
            "image for a file."
        )
    return branch


def add_saved(model: ModelPatcher, branch: SavedBranch) -> ModelPatcher:
    """A clone of the model with one more condition, from a file."""
    setup = host.get_setup(model)
    return host.with_setup(model, replace(setup, saved=(*setup.saved, branch)))

"""ComfyUI's FLUX.1: whether a MODEL is one, whether its parts are its own, and its layers."""

import inspect
from pathlib import Path
from typing import Any

import comfy.ldm.flux.layers
import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_management
import comfy.utils
from comfy.model_patcher import ModelPatcher

from ..errors import Omini2Error, require_kind
from ..flux1.model import Flux1
from ..lora.deltas import Target
from .kernels import functions

# Classes in ``comfy.model_base`` beside FLUX.1's own whose references can be kept.
EDITING = ("Flux2", "LongCatImage", "QwenImage", "MageFlow", "Krea2")


def require_flux1(model: ModelPatcher) -> Any:
    """The diffusion model, if it is ComfyUI's own FLUX.1 without extra picture channels.

    Raises:
        Omini2Error: it is anything else; decided by what it is, never by a file name.
    """
    require_kind("model", model, isinstance(model, ModelPatcher), "model", "Load Diffusion Model")
    base = model.model
    diffusion_model: Any = getattr(base, "diffusion_model", None)
    config = getattr(getattr(base, "model_config", None), "unet_config", {})
    # Flux.2 and Chroma share classes with FLUX.1, but have no pooled text.
    if (
        not isinstance(base, comfy.model_base.Flux)
        or type(diffusion_model) is not comfy.ldm.flux.model.Flux
        or config.get("image_model") != "flux"
        or diffusion_model.params.vec_in_dim is None
    ):
        served = type(base).__name__ in EDITING
        besides = ", or use Condition Cache alone, which keeps this model's references"
        raise Omini2Error(
            f"model: this is {model_name(base)}, not FLUX.1 as ComfyUI runs it; load a FLUX.1 "
            "dev, schnell or Krea model with Load Diffusion Model or Load Checkpoint"
            f"{besides if served else ''}."
        )
    params = diffusion_model.params
    if diffusion_model.img_in.in_features != params.out_channels * params.patch_size**2:
        raise Omini2Error(
            "model: this FLUX.1 takes extra picture channels (Fill, Canny, Depth or a control "
            "LoRA); load plain FLUX.1 dev, schnell or Krea instead."
        )
    return diffusion_model


def require_own_parts(model: ModelPatcher) -> None:
    """Refuses parts of the model that another extension has put there and conditions can't use.

    Positions as DyPE computes them may depend on the step and on which tokens there are, so a
    condition would lie elsewhere than the picture does. Blocks as IPAdapter-Flux' compute their
    attention past ComfyUI's.

    Raises:
        Omini2Error: there is such a part.
    """
    embedding = _module(model, "pe_embedder")
    if type(embedding) is not comfy.ldm.flux.layers.EmbedND:
        raise Omini2Error(
            f"model: another extension ({type(embedding).__name__}) computes the picture's "
            "positions in its own way, and conditions would not lie where the picture does; take "
            "its node off this model, or Apply Omini2 LoRA."
        )
    for block in flux1(model).blocks:
        own = getattr(comfy.ldm.flux.layers, block.layer)
        module = _module(model, block.path)
        if not isinstance(getattr(module, "_orig_mod", module), own):  # or torch.compile's of it
            raise Omini2Error(
                f"model: another extension ({type(module).__name__}) has replaced its blocks, and "
                "conditions can't take part in those; take its node off this model, or Apply "
                "Omini2 LoRA."
            )


def flux1(model: ModelPatcher) -> Flux1:
    """The engine's view of a FLUX.1."""
    return Flux1(model.model.diffusion_model, functions())


def _module(model: ModelPatcher, path: str) -> Any:
    """As this MODEL has it, whatever of another's is in the weights' place right now."""
    return model.get_model_object(f"diffusion_model.{path}")


def model_name(base: object) -> str:
    """Names a model by its classes."""
    kind = type(getattr(base, "diffusion_model", base))
    inner = kind.__name__
    if inner == "Flux" and kind is not comfy.ldm.flux.model.Flux:  # as Fluxtapoz changes it
        inner = f"Flux as {Path(kind.__module__).name} has it"
    outer = type(base).__name__
    return outer if inner == outer else f"{outer} ({inner})"


def lora_targets(model: ModelPatcher) -> tuple[dict[str, Target], set[str]]:
    """Diffusers' module names -> where they are in ComfyUI's model.

    Returns:
        the modules that a condition passes through, and the names of all the others.

    Raises:
        Omini2Error: another extension has put something else in their place.
    """
    require_own_parts(model)
    config = model.model.model_config.unet_config
    passed = flux1(model).linears
    targets: dict[str, Target] = {}
    foreign: set[str] = set()
    for name, where in comfy.utils.flux_to_diffusers(config).items():
        if not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        key, offset = (where, None) if isinstance(where, str) else where[:2]
        path = key.removesuffix(".weight")
        if path in passed:
            block, name = passed[path]
            linear = _module(model, block).get_submodule(name)
            start, length = (0, linear.out_features) if offset is None else offset[1:]
            targets[module] = Target(path, start, length, linear.in_features)
        else:
            foreign.add(module)
    return targets, foreign


def replaced_forward(flux: Any) -> str | None:
    """Names what stands in for the model's own forward; None if it is ComfyUI's."""
    forward = inspect.unwrap(getattr(flux.forward_orig, "__func__", flux.forward_orig))
    module = getattr(forward, "__module__", "")
    if module == comfy.ldm.flux.model.__name__:
        return None
    name = getattr(forward, "__qualname__", type(forward).__qualname__)
    # Extensions are loaded under the path of their folder.
    return f"{Path(module).name}: {name.rpartition('.')[2]}"


def kv_bytes_per_token(model: ModelPatcher) -> int:
    """Bytes of K and V that one condition token takes over all blocks."""
    return flux1(model).kv_numbers * number_bytes(model)


def number_bytes(model: ModelPatcher) -> int:
    """Bytes of one number in the model's own computation."""
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    size: int = comfy.model_management.dtype_size(dtype)
    return size

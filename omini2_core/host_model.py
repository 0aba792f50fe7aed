"""What the extension needs of ComfyUI's FLUX.1 model: its kind, its layers, its numbers."""

import inspect
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.ldm.flux.model
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .attention import Partial
from .errors import Omini2Error, require_kind, warn
from .kept import Identity, Kept
from .lora import Delta, Deltas, Linears, Target

BRANCH_LINEARS = (  # the linear layers that a condition's tokens pass through
    ("img_in",),
    ("img_mod.lin", "img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2"),
    ("modulation.lin", "linear1", "linear2"),
)


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
        raise Omini2Error(
            f"model: this is {_model_name(base)}, not FLUX.1 as ComfyUI runs it; load a FLUX.1 "
            "dev, schnell or Krea model with Load Diffusion Model or Load Checkpoint."
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
    embedding = _part(model, "pe_embedder")
    if type(embedding) is not comfy.ldm.flux.layers.EmbedND:
        raise Omini2Error(
            f"model: another extension ({type(embedding).__name__}) computes the picture's "
            "positions in its own way, and conditions would not lie where the picture does; take "
            "its node off this model, or Apply Omini2 LoRA."
        )
    flux = model.model.diffusion_model
    for kind, own in _BLOCKS.items():
        for index in range(len(getattr(flux, kind))):
            block = _part(model, f"{kind}.{index}")
            if not isinstance(getattr(block, "_orig_mod", block), own):  # or torch.compile's of it
                raise Omini2Error(
                    f"model: another extension ({type(block).__name__}) has replaced its blocks, "
                    "and conditions can't take part in those; take its node off this model, or "
                    "Apply Omini2 LoRA."
                )


_BLOCKS = {
    "double_blocks": comfy.ldm.flux.layers.DoubleStreamBlock,
    "single_blocks": comfy.ldm.flux.layers.SingleStreamBlock,
}


def _part(model: ModelPatcher, path: str) -> Any:
    """As this MODEL has it, whatever of another's is in the weights' place right now."""
    return model.get_model_object(f"diffusion_model.{path}")


def _model_name(base: object) -> str:
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
    first, double, single = BRANCH_LINEARS
    targets: dict[str, Target] = {}
    foreign: set[str] = set()
    for name, where in comfy.utils.flux_to_diffusers(config).items():
        if not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        key, offset = (where, None) if isinstance(where, str) else where[:2]
        path = key.removesuffix(".weight")
        kind, _, rest = path.partition(".")
        index, _, inner = rest.partition(".")
        if (
            path in first
            or (kind, inner in double) == ("double_blocks", True)
            or (kind == "single_blocks" and inner in single)
        ):
            linear = _part(model, f"{kind}.{index}" if inner else path).get_submodule(inner)
            start, length = (0, linear.out_features) if offset is None else offset[1:]
            targets[module] = Target(path, start, length, linear.in_features)
        else:
            foreign.add(module)
    return targets, foreign


class FluxBackbone:
    """The engine's view of ComfyUI's FLUX; see ``backbone.Backbone``."""

    def __init__(self, flux: Any) -> None:
        self._flux = flux

    @property
    def double_blocks(self) -> Any:
        return self._flux.double_blocks

    @property
    def single_blocks(self) -> Any:
        return self._flux.single_blocks

    def embed(self, linear: Linears, tokens: Tensor) -> Tensor:
        return linear("img_in", self._flux.img_in, tokens)

    def vector(self, linear: Linears, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        flux = self._flux

        def mlp(path: str, module: Any, x: Tensor) -> Tensor:
            hidden = linear(f"{path}.in_layer", module.in_layer, x)
            return linear(f"{path}.out_layer", module.out_layer, module.silu(hidden))

        def embedding(t: Tensor) -> Tensor:
            waves: Tensor = comfy.ldm.flux.layers.timestep_embedding(t, 256)
            return waves.to(pooled.dtype)

        start = torch.zeros(pooled.shape[0], device=pooled.device)
        vector = mlp("time_in", flux.time_in, embedding(start))
        if flux.params.guidance_embed and guidance is not None:
            vector = vector + mlp("guidance_in", flux.guidance_in, embedding(guidance))
        return vector + mlp("vector_in", flux.vector_in, pooled[:, : flux.params.vec_in_dim])

    def outputs(self, module: Any, x: Tensor, start: int, stop: int) -> Tensor:
        if not _is_plain(module, x):
            whole: Tensor = module(x)
            return whole[..., start:stop]
        bias = None if module.bias is None else module.bias[start:stop]
        return F.linear(x, module.weight[start:stop], bias)

    def rope(self, ids: Tensor) -> Tensor:
        rotations: Tensor = self._flux.pe_embedder(ids)
        return rotations

    def rotate(self, q: Tensor, k: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
        rotated: tuple[Tensor, Tensor] = comfy.ldm.flux.math.apply_rope(q, k, rotations)
        return rotated

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        attended: Tensor = optimized_attention(q, k, v, q.shape[1], mask=mask, skip_reshape=True)
        return attended


def _is_plain(module: Any, x: Tensor) -> bool:
    """Whether a linear layer does nothing but multiply, so that a part of it can be had alone.

    Quantised and streamed weights, and LoRAs applied on the way, are the whole module's business.
    """
    plain = comfy.ops.disable_weight_init.Linear
    return (
        type(module).forward is plain.forward
        and not (module.comfy_cast_weights or module.weight_function or module.bias_function)
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        and module.weight.dtype == x.dtype
        and module.weight.device == x.device
    )


def partial_of(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Partial | None:
    """The kernel behind one of the host's attention functions, telling its log-sum-exp.

    Only PyTorch's kernels do: flash attention on CPU and GPU, and memory-efficient attention.
    """
    if inspect.unwrap(function) is not inspect.unwrap(
        comfy.ldm.modules.attention.attention_pytorch
    ):
        return None
    aten: Any = torch.ops.aten
    if q.device.type == "cpu":
        return lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if q.device.type != "cuda":
        return None
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    if torch.backends.cuda.can_use_flash_attention(params):
        return lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    if not torch.backends.cuda.can_use_efficient_attention(params):
        return None

    def efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
        return out, lse[..., : q.shape[2]]  # the kernel pads the queries

    return efficient


def ordinary_lora_deltas(patcher: ModelPatcher) -> Deltas:
    """What LoRAs loaded the ordinary way add to the model's weights.

    They are meant for text and picture only, but the branches go through the same weights; so
    each branch takes them off again, on its activations. Patches of other kinds than plain LoRA
    (merged models above all) stay.

    Raises:
        Omini2Error: a control LoRA, which changes what the model's first layer takes.
    """
    deltas: Deltas = {}
    others: set[str] = set()
    for key, patches in patcher.patches.items():
        path = key.removeprefix("diffusion_model.").removesuffix(".weight")
        kept: list[Delta] = []
        for strength, patch, strength_model, offset, function, *_ in patches:
            if strength_model != 1.0:
                kept = [replace(d, scale=d.scale * strength_model) for d in kept]
            name = getattr(patch, "name", None)
            if name is None:
                continue
            if name != "lora" or function is not None:
                others.add(name)
                continue
            up, down, alpha, mid, dora_scale, reshape = patch.weights
            if reshape is not None:
                raise Omini2Error(
                    "model: a control LoRA gives this FLUX.1 extra picture channels, which "
                    "conditions have none of; take it out of the graph."
                )
            if mid is not None or dora_scale is not None:
                others.add("lora with mid weights" if dora_scale is None else "dora")
                continue
            scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
            start = 0 if offset is None else offset[1]
            kept.append(Delta(start, down.flatten(1), up.flatten(1), scale))
        if kept:
            deltas[path] = kept
    if patcher.hook_patches:
        others.add("hook")
    if others:
        warn(
            f"model: a LoRA of type {', '.join(sorted(others))} changes the conditions too; only "
            "plain LoRAs can be kept to text and picture, so check the result or leave it out."
        )
    return deltas


def replaced_forward(flux: Any) -> str | None:
    """Names what stands in for the model's own forward; None if it is ComfyUI's."""
    forward = inspect.unwrap(getattr(flux.forward_orig, "__func__", flux.forward_orig))
    module = getattr(forward, "__module__", "")
    if module == comfy.ldm.flux.model.__name__:
        return None
    name = getattr(forward, "__qualname__", type(forward).__qualname__)
    # Extensions are loaded under the path of their folder.
    return f"{Path(module).name}: {name.rpartition('.')[2]}"


def kept_of(model: ModelPatcher) -> Kept:
    """What is kept between runs of this model: on the model itself, so that it goes with it."""
    base = model.model
    if not hasattr(base, "omini2_kept"):
        base.omini2_kept = Kept()
    kept: Kept = base.omini2_kept
    return kept


def weights_identity(model: ModelPatcher) -> Hashable | None:
    """Names the weights that a run computes with, beside the model; None if they can't be named.

    Patches have an id in the host that changes with them. What replaces parts of the model is
    told apart as objects. Hooks and injections change weights in ways of their own.
    """
    if model.hook_patches or model.injections or model.weight_wrapper_patches:
        return None
    replaced = sorted(
        (key, value) for key, value in model.object_patches.items() if key != "model_sampling"
    )
    return model.patches_uuid, tuple((key, Identity(value)) for key, value in replaced)


def kv_bytes_per_token(model: ModelPatcher) -> int:
    """Bytes of K and V that one condition token takes over all blocks."""
    flux = model.model.diffusion_model
    blocks = len(flux.double_blocks) + len(flux.single_blocks)
    hidden: int = flux.hidden_size
    return 2 * blocks * hidden * number_bytes(model)


def number_bytes(model: ModelPatcher) -> int:
    """Bytes of one number in the model's own computation."""
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    size: int = comfy.model_management.dtype_size(dtype)
    return size

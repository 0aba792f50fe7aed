"""What differs between versions of ComfyUI, and whether one has all that the nodes work through.

By what a host has, never by the version that it reports. Nothing of the host is imported before it
is asked for, so that this can be loaded anywhere.
"""

import inspect
import logging
import pkgutil
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import warn
from ..flux1.numbers import SLOTS

if TYPE_CHECKING:
    from torch import Tensor
NEEDED = "0.3.76"  # as pyproject.toml's requires-comfyui says
PARTS = (
    "comfy_api.latest:ComfyExtension",
    "comfy_api.latest:io.Schema",
    "comfy_execution.progress:get_progress_state",
    "comfy_execution.utils:get_executing_context",
    "comfy.model_patcher:create_model_options_clone",
    "comfy.patcher_extension:add_wrapper_with_key",
    "comfy.patcher_extension:CallbacksMP.ON_DETACH",
    "comfy.patcher_extension:WrappersMP.APPLY_MODEL",
    "comfy.patcher_extension:WrappersMP.DIFFUSION_MODEL",
    "comfy.patcher_extension:WrappersMP.OUTER_SAMPLE",
    "comfy.patcher_extension:WrappersMP.PREPARE_SAMPLING",
    "comfy.utils:flux_to_diffusers",
)
# The hooks within the model, which only show when it runs.
HOOKS = ("DIFFUSION_MODEL", "post_input", *SLOTS, "attention override")
SHAPE = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 8,
    "context_in_dim": 8,
    "hidden_size": 16,
    "mlp_ratio": 1.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [2, 2, 4],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
}


def refused() -> bool:
    """Whether the host lacks what the nodes need, which is then said in the log."""
    lacking = first_lacking()
    if lacking is not None:
        warn(
            f"This ComfyUI has no {lacking}, which the nodes work through, so they are left out; "
            f"update ComfyUI to {NEEDED} or newer, or take out the extension that removes it."
        )
    return lacking is not None


def first_lacking() -> str | None:
    """The name of something that the nodes need and the host doesn't have; None if it has all."""
    for part in PARTS:
        try:
            pkgutil.resolve_name(part)
        except (ImportError, AttributeError):
            return part.replace(":", ".")
    called = hooks_called()
    return next((f"{hook} hook" for hook in HOOKS if hook not in called), None)


def hooks_called() -> set[str]:
    """Which of the hooks the host's FLUX calls, found out by running a very small one.

    All of them where that can't be done: only what a host is seen to lack speaks against it.
    """
    import comfy.ldm.flux.model
    import comfy.ops
    import torch
    from comfy.patcher_extension import WrappersMP

    called: set[str] = set()

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        called.add("DIFFUSION_MODEL")
        return executor(*args, **kwargs)

    def post_input(args: dict[str, Any]) -> dict[str, Any]:
        called.add("post_input")
        return args

    def block(slot: str, args: dict[str, Any], extra: dict[str, Any]) -> Any:
        called.add(slot)
        return extra["original_block"](args)

    def attention(
        function: Any, q: "Tensor", k: "Tensor", v: "Tensor", *args: Any, **kwargs: Any
    ) -> "Tensor":
        called.add("attention override")
        return v.transpose(1, 2).flatten(2)  # of the right shape, with whatever kernels there are

    options = {
        "wrappers": {WrappersMP.DIFFUSION_MODEL: {"omini2": [wrapper]}},
        "patches": {"post_input": [post_input]},
        "patches_replace": {"dit": {(slot, 0): partial(block, slot) for slot in SLOTS}},
        "optimized_attention_override": attention,
    }
    try:
        with torch.no_grad():
            flux = comfy.ldm.flux.model.Flux(
                dtype=torch.float32,
                device="cpu",
                operations=comfy.ops.disable_weight_init,
                **flux_shape(SHAPE),
            )
            flux(
                torch.zeros(1, 16, 4, 4),
                torch.ones(1),
                torch.zeros(1, 2, 8),
                torch.zeros(1, 8),
                transformer_options=options,
            )
    except Exception:
        logging.debug("Omini2: the hooks of this ComfyUI can't be tried.", exc_info=True)
        return set(HOOKS)
    return called


def flux_shape(shape: dict[str, Any]) -> dict[str, Any]:
    """A FLUX.1's shape in the host's terms; newer hosts want one field more."""
    from comfy.ldm.flux.model import FluxParams

    newer = any(each.name == "txt_ids_dims" for each in fields(FluxParams))
    return {**shape, "txt_ids_dims": []} if newer else shape


def calls_post_input(model: type) -> bool:
    """Whether a class of the host's models has the `post_input` hook; older ones of some haven't.

    By the names in its forward's code: these models are too large to be tried.
    """
    forwards = (getattr(model, name, None) for name in ("_forward", "forward_orig"))
    codes = (getattr(inspect.unwrap(each), "__code__", None) for each in forwards if each)
    return any("post_input" in code.co_consts for code in codes if code is not None)


def search_aliases(words: Sequence[str]) -> dict[str, list[str]]:
    """Words to find a node by, as an argument of ``io.Schema``; older hosts have none for them."""
    from comfy_api.latest import io

    newer = any(each.name == "search_aliases" for each in fields(io.Schema))
    return {"search_aliases": list(words)} if newer else {}


def bypass_hook() -> type | None:
    """What newer hosts put in the place of a layer's forward for Load LoRA (Bypass)."""
    try:
        from comfy.weight_adapter.bypass import BypassForwardHook
    except ImportError:
        return None
    hook: type = BypassForwardHook
    return hook


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory; newer hosts know more ways in which it says so."""
    import comfy.model_management as management

    newer = getattr(management, "is_oom", None)
    return bool(newer(error)) if newer else isinstance(error, management.OOM_EXCEPTION)

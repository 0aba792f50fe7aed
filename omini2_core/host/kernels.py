"""The host's kernels, as the engine calls them."""

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention
from torch import Tensor

from ..engine.attention import Attention, Partial, honours_masks
from ..flux1.model import Functions
from . import versions


def functions() -> Functions:
    """What ComfyUI computes FLUX.1 with."""
    return Functions(
        waves=comfy.ldm.flux.layers.timestep_embedding,
        rotate=comfy.ldm.flux.math.apply_rope,
        attend=attend,
        outputs=outputs,
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The attention that the user has selected."""
    attended: Tensor = optimized_attention(q, k, v, q.shape[1], mask=mask, skip_reshape=True)
    return attended


def outputs(module: Any, x: Tensor, start: int, stop: int) -> Tensor:
    """Outputs ``start`` to ``stop`` of a linear layer, without the others where possible."""
    if not _is_plain(module, x):
        return call(module, x)[..., start:stop]
    bias = None if module.bias is None else module.bias[start:stop]
    return F.linear(x, module.weight[start:stop], bias)


def call(module: Any, x: Tensor) -> Tensor:
    """A linear layer without the LoRAs that Load LoRA (Bypass) adds to what it gives."""
    forward = own_forward(module)
    y: Tensor = module(x) if forward is None else forward(x)
    return y


def own_forward(module: Any) -> Callable[..., Any] | None:
    """A layer's forward below the host's bypass LoRAs; None if there are none."""
    forward = found = vars(module).get("forward")
    hook = versions.bypass_hook()
    while hook is not None and isinstance(getattr(forward, "__self__", None), hook):
        forward = forward.__self__.original_forward
    return None if forward is found else forward


def _is_plain(module: Any, x: Tensor) -> bool:
    """Whether a linear layer does nothing but multiply, so that some outputs can be had alone.

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


@dataclass(frozen=True)
class Called:
    """One attention function of the host's, as a block has called it.

    Attributes:
        previous: another extension's override, if any.
        given: the arguments beside q, k, v, heads and mask.
    """

    function: Callable[..., Tensor]
    previous: Callable[..., Tensor] | None
    heads: int
    given: dict[str, Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The attention, with other tokens than the block's own."""
        arguments = q, k, v, self.heads
        return call_on(self.previous, self.function, *arguments, mask=mask, **self.given)


def call_on(
    previous: Callable[..., Any] | None, function: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    """An attention function through another extension's override, if there is one."""
    return function(*args, **kwargs) if previous is None else previous(function, *args, **kwargs)


class MaskHonouring:
    """PyTorch's attention for masks of ours that another would ignore."""

    def __init__(self, say: Callable[[], None]) -> None:
        """Args:
        say: tells the person which input made a mask needed.
        """
        self._say = say
        self._honours: dict[Hashable, bool] = {}

    def guard(self, attend: Attention, name: Hashable, given: Tensor | None) -> Attention:
        """An attention function that looks at masks.

        Args:
            name: what the function is known by.
            given: the host's own mask, which is none of ours.
        """

        def careful(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            if mask is None or mask is given or self._honoured(attend, name, q, k, v):
                return attend(q, k, v, mask)
            out: Tensor = attention_pytorch(q, k, v, q.shape[1], mask=mask, skip_reshape=True)
            return out

        return careful

    def _honoured(self, attend: Attention, name: Hashable, q: Tensor, k: Tensor, v: Tensor) -> bool:
        if name not in self._honours:
            self._honours[name] = honours_masks(attend, q, k, v)
            if not self._honours[name]:
                self._say()
        return self._honours[name]


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

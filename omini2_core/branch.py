"""How a condition's tokens go through FLUX's blocks: FLUX's own image stream, with its own LoRA.

Each block function is a generator in two halves: it yields the branch's q, k, v and is sent the
attention's result, so that the caller decides who attends to whom (original ``block_forward`` and
``single_block_forward``). The blocks' own modules do the work.
"""

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn

from .lora import Linears, Outputs

Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Half = Generator[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]


def double_block(
    block: Any, path: str, linear: Linears, x: Tensor, vec: Tensor, rotate: Rotate
) -> Half:
    """One double-stream block, image half only.

    Args:
        block: the model's ``DoubleStreamBlock``.
        path: its module path, for the LoRA.
        linear: the branch's linear layers.
        x: (rows, tokens, hidden).
        vec: (rows or 1, hidden) time, guidance and pooled text.
        rotate: RoPE on q and k, (rows, heads, tokens, head_dim) each.

    Yields:
        q, k, v after RoPE; send the attention's result (rows, tokens, hidden).

    Returns:
        x after the block.
    """
    mod = _modulation(block.img_mod, f"{path}.img_mod", linear, vec)
    shift1, scale1, gate1, shift2, scale2, gate2 = mod.chunk(6, dim=-1)

    attn = block.img_attn
    qkv = linear(f"{path}.img_attn.qkv", attn.qkv, _modulate(block.img_norm1(x), shift1, scale1))
    q, k, v = _heads(qkv, block.num_heads)
    q, k = attn.norm(q, k, v)
    q, k = rotate(q, k)
    attended = yield q, k, v

    x = x + gate1 * linear(f"{path}.img_attn.proj", attn.proj, attended)
    mlp = _modulate(block.img_norm2(x), shift2, scale2)
    mlp = linear(f"{path}.img_mlp.0", block.img_mlp[0], mlp)
    mlp = linear(f"{path}.img_mlp.2", block.img_mlp[2], block.img_mlp[1](mlp))
    return _finite(x + gate2 * mlp)


def single_block(
    block: Any, path: str, linear: Linears, x: Tensor, vec: Tensor, rotate: Rotate
) -> Half:
    """One single-stream block on a condition's tokens; arguments as :func:`double_block`."""
    mod = _modulation(block.modulation, f"{path}.modulation", linear, vec)
    shift, scale, gate = mod.chunk(3, dim=-1)

    hidden = linear(f"{path}.linear1", block.linear1, _modulate(block.pre_norm(x), shift, scale))
    qkv, mlp = hidden.split([3 * block.hidden_size, block.mlp_hidden_dim], dim=-1)
    q, k, v = _heads(qkv, block.num_heads)
    q, k = block.norm(q, k, v)
    q, k = rotate(q, k)
    attended = yield q, k, v

    out = torch.cat((attended, block.mlp_act(mlp)), dim=-1)
    return _finite(x + gate * linear(f"{path}.linear2", block.linear2, out))


def last_keys_values(
    block: Any,
    path: str,
    linear: Linears,
    x: Tensor,
    vec: Tensor,
    rotate: Rotate,
    outputs: Outputs,
) -> tuple[Tensor, Tensor]:
    """K (after RoPE) and V in the last single-stream block, of which nobody needs more.

    Args:
        outputs: gives some outputs of a linear layer, for less work where that is possible.
        block, path, linear, x, vec, rotate: as :func:`double_block`.
    """
    h = block.hidden_size
    mod = _modulation(block.modulation, f"{path}.modulation", linear, vec)
    shift, scale, _ = mod.chunk(3, dim=-1)
    x = _modulate(block.pre_norm(x), shift, scale)
    kv = linear.part(f"{path}.linear1", block.linear1, x, h, 3 * h, outputs)
    k, v = kv.view(*kv.shape[:2], 2, block.num_heads, -1).permute(2, 0, 3, 1, 4)
    k = block.norm.key_norm(k).to(v)
    return rotate(k, k)[1], v


def _modulation(module: Any, path: str, linear: Linears, vec: Tensor) -> Tensor:
    """(rows, hidden) -> (rows, 1, n * hidden): shifts, scales and gates, as FLUX orders them."""
    return linear(f"{path}.lin", module.lin, nn.functional.silu(vec)[:, None])


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, tokens, 3 * hidden) -> three of (rows, heads, tokens, head_dim)."""
    split = qkv.view(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    return split[0], split[1], split[2]


def _finite(x: Tensor) -> Tensor:
    """FLUX's residual stream leaves float16's range; the host clips it the same way."""
    if x.dtype == torch.float16:
        x = torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504)
    return x

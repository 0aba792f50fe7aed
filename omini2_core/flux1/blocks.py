"""How a condition's tokens go through FLUX.1's blocks: its own image stream, with a LoRA.

The way through a block is a generator in two halves: it yields the branch's q, k, v and is sent the
attention's result, so that the caller decides who attends to whom (original ``block_forward`` and
``single_block_forward``). The blocks' own modules do the work.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..engine.model import Half, Rotate
from ..lora.deltas import Linears, Outputs

Rows = tuple[int, int]  # outputs of a layer, from the first to the one behind the last


@dataclass(frozen=True, eq=False)
class Flux1Block:
    """A block by its place: which module is there may change while a run is prepared.

    Attributes:
        among: the model's blocks of this kind.
        path: the place's module path, for the LoRA.
        slot: what the place is called where it can be replaced.
        layer: the module's class, in FLUX.1's own words.
        linears, norms: the layers that a condition's tokens pass, below the module.
    """

    among: Any
    path: str
    slot: tuple[str, int]

    layer: ClassVar[str]
    linears: ClassVar[tuple[str, ...]]
    norms: ClassVar[tuple[str, ...]]

    @property
    def module(self) -> Any:
        """What is there."""
        return self.among[self.slot[1]]

    @property
    def passed(self) -> dict[str, Rows | None]:
        """Paths of the layers that a condition passes, and which of their outputs it gets."""
        return {f"{self.path}.{name}": None for name in (*self.linears, *self.norms)}

    @property
    def passed_to_keys(self) -> dict[str, Rows | None]:
        """The same where only K and V are wanted."""
        return self.passed


class DoubleBlock(Flux1Block):
    """The image half of a double-stream block; see :class:`..engine.model.Block`."""

    layer = "DoubleStreamBlock"
    linears = ("img_mod.lin", "img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2")
    norms = ("img_attn.norm.query_norm", "img_attn.norm.key_norm")

    def halves(self, linear: Linears, x: Tensor, vec: Tensor, rotate: Rotate) -> Half:
        block, path = self.module, self.path
        mod = _modulation(block.img_mod, f"{path}.img_mod", linear, vec)
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.chunk(6, dim=-1)

        attn = block.img_attn
        modulated = _modulate(block.img_norm1(x), shift1, scale1)
        qkv = linear(f"{path}.img_attn.qkv", attn.qkv, modulated)
        q, k, v = _heads(qkv, block.num_heads)
        del modulated, qkv  # or it would be alive until the end, as the generator is
        q, k = attn.norm(q, k, v)
        q, k = rotate(q, k)
        attended = yield q, k, v
        del q, k, v

        x = x + gate1 * linear(f"{path}.img_attn.proj", attn.proj, attended)
        mlp = _modulate(block.img_norm2(x), shift2, scale2)
        mlp = linear(f"{path}.img_mlp.0", block.img_mlp[0], mlp)
        mlp = linear(f"{path}.img_mlp.2", block.img_mlp[2], block.img_mlp[1](mlp))
        return _finite(x + gate2 * mlp)

    def keys_values(
        self, linear: Linears, x: Tensor, vec: Tensor, rotate: Rotate
    ) -> tuple[Tensor, Tensor]:
        _, k, v = next(self.halves(linear, x, vec, rotate))
        return k, v


@dataclass(frozen=True, eq=False)
class SingleBlock(Flux1Block):
    """A single-stream block; see :class:`..engine.model.Block`.

    Attributes:
        outputs: gives some outputs of a linear layer, for less work where that is possible.
    """

    outputs: Outputs

    layer = "SingleStreamBlock"
    linears = ("modulation.lin", "linear1", "linear2")
    norms = ("norm.query_norm", "norm.key_norm")

    def halves(self, linear: Linears, x: Tensor, vec: Tensor, rotate: Rotate) -> Half:
        block, path = self.module, self.path
        mod = _modulation(block.modulation, f"{path}.modulation", linear, vec)
        shift, scale, gate = mod.chunk(3, dim=-1)

        modulated = _modulate(block.pre_norm(x), shift, scale)
        hidden = linear(f"{path}.linear1", block.linear1, modulated)
        qkv, mlp = hidden.split([3 * block.hidden_size, block.mlp_hidden_dim], dim=-1)
        q, k, v = _heads(qkv, block.num_heads)
        del modulated, hidden, qkv
        q, k = block.norm(q, k, v)
        q, k = rotate(q, k)
        attended = yield q, k, v
        del q, k, v

        out = torch.cat((attended, block.mlp_act(mlp)), dim=-1)
        return _finite(x + gate * linear(f"{path}.linear2", block.linear2, out))

    @property
    def passed_to_keys(self) -> dict[str, Rows | None]:
        """Layers where only K and V are wanted."""
        h = self.module.hidden_size
        names = "modulation.lin", "linear1", "norm.key_norm"
        rows = (0, 2 * h), (h, 3 * h), None
        return {f"{self.path}.{name}": each for name, each in zip(names, rows, strict=True)}

    def keys_values(
        self, linear: Linears, x: Tensor, vec: Tensor, rotate: Rotate
    ) -> tuple[Tensor, Tensor]:
        block, path = self.module, self.path
        h = block.hidden_size
        mod = _modulation(block.modulation, f"{path}.modulation", linear, vec)
        shift, scale, _ = mod.chunk(3, dim=-1)
        x = _modulate(block.pre_norm(x), shift, scale)
        kv = linear.outputs(f"{path}.linear1", block.linear1, x, h, 3 * h, self.outputs)
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
    """FLUX.1's residual stream leaves float16's range; the host clips it the same way."""
    if x.dtype == torch.float16:
        x = torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504)
    return x

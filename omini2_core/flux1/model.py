"""FLUX.1 as the engine sees it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..engine.attention import Attention
from ..lora.deltas import Linears, Outputs
from .blocks import DoubleBlock, Rows, SingleBlock
from .numbers import SLOTS, TIME_WAVES


@dataclass(frozen=True)
class Functions:
    """What the host computes with.

    Attributes:
        waves: (rows,) times, n -> (rows, n) sines and cosines.
        rotate: q, k, rotations -> q and k after RoPE.
        attend: the host's selected attention.
        outputs: some outputs of a linear layer, without the others where possible.
    """

    waves: Callable[[Tensor, int], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    attend: Attention
    outputs: Outputs


class Flux1:
    """See :class:`..engine.model.Model`."""

    def __init__(self, flux: Any, functions: Functions) -> None:
        """Args:
        flux: the host's module.
        """
        self.module = getattr(flux, "_orig_mod", flux)  # or torch.compile's of it
        self._flux = flux
        self._functions = functions
        self.rotate = functions.rotate
        self.attend = functions.attend
        double, single = SLOTS
        doubles, singles = flux.double_blocks, flux.single_blocks
        self.blocks: list[DoubleBlock | SingleBlock] = [
            DoubleBlock(doubles, f"double_blocks.{i}", (double, i)) for i in range(len(doubles))
        ]
        self.blocks += [
            SingleBlock(singles, f"single_blocks.{i}", (single, i), functions.outputs)
            for i in range(len(singles))
        ]

    @property
    def heads(self) -> int:
        """Attention heads."""
        heads: int = self._flux.num_heads
        return heads

    @property
    def head_dim(self) -> int:
        """Numbers in one head of one token."""
        hidden: int = self._flux.hidden_size
        return hidden // self.heads

    @property
    def kv_numbers(self) -> int:
        """Numbers in K and V of one token over all blocks."""
        return 2 * len(self.blocks) * self.heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[str, str]]:
        """Paths of the linear layers that a LoRA may act on for a condition.

        Returns:
            each one's path -> the path of its block, and its own below that.
        """
        within = [(block.path, name) for block in self.blocks for name in block.linears]
        return {"img_in": ("img_in", ""), **{".".join(each): each for each in within}}

    @property
    def passed(self) -> dict[str, Rows | None]:
        """Paths of all layers that a condition passes, and which of their outputs it gets.

        None for all outputs.
        """
        embedders = ["time_in", "vector_in"]
        embedders += ["guidance_in"] if self._flux.params.guidance_embed else []
        first = [f"{name}.{layer}" for name in embedders for layer in ("in_layer", "out_layer")]
        layers: dict[str, Rows | None] = dict.fromkeys(("img_in", *first))
        for block in self.blocks[:-1]:
            layers |= block.passed
        return layers | self.blocks[-1].passed_to_keys

    def embed(self, linear: Linears, tokens: Tensor) -> Tensor:
        return linear("img_in", self._flux.img_in, tokens)

    def vector(
        self, linear: Linears, pooled: Tensor, guidance: Tensor | None, time: Tensor
    ) -> Tensor:
        flux = self._flux

        def mlp(path: str, module: Any, x: Tensor) -> Tensor:
            hidden = linear(f"{path}.in_layer", module.in_layer, x)
            return linear(f"{path}.out_layer", module.out_layer, module.silu(hidden))

        def embedding(t: Tensor) -> Tensor:
            return self._functions.waves(t, TIME_WAVES).to(pooled.dtype)

        vector = mlp("time_in", flux.time_in, embedding(time))
        if flux.params.guidance_embed and guidance is not None:
            vector = vector + mlp("guidance_in", flux.guidance_in, embedding(guidance))
        return vector + mlp("vector_in", flux.vector_in, pooled[:, : flux.params.vec_in_dim])

    def rope(self, ids: Tensor) -> Tensor:
        rotations: Tensor = self._flux.pe_embedder(ids)
        return rotations

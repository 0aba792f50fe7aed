"""What a run costs, counted by hand: FLOPs and bytes of K/V.

One multiply and add are 2 FLOPs. Matrix products and attention are counted; norms, activations,
RoPE and copies are not, as is usual. `tests/benchmarks/test_costs.py` holds these formulas against
the operations that PyTorch counts while the real model runs.

Symbols in the docstrings: h = hidden, m = mlp_ratio * hidden, T = text tokens, P = picture tokens,
N = T + P, C = a condition's tokens, r = LoRA rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

PATCH = 64  # numbers in one token of FLUX's latents: 2 x 2 x 16 channels
SINUSOID = 256  # width of the embeddings of time and guidance


@dataclass(frozen=True)
class Shape:
    """The sizes of a FLUX model."""

    hidden: int
    depth: int
    depth_single: int
    text_width: int
    pooled_width: int
    mlp_ratio: float = 4.0
    guidance: bool = True

    @property
    def mlp(self) -> int:
        """m: the width inside the MLP."""
        return int(self.hidden * self.mlp_ratio)

    @property
    def blocks(self) -> int:
        """All blocks; each has its own K/V."""
        return self.depth + self.depth_single


FLUX1_DEV = Shape(3072, 19, 38, text_width=4096, pooled_width=768)


@dataclass(frozen=True)
class ConditionCost:
    """A condition as far as it costs something.

    ``every`` is the number of steps between two computations: 1 is every step, None only once.
    """

    tokens: int
    joint: bool
    every: int | None
    rank: int = 4

    def computations(self, steps: int) -> int:
        """How often its branch is run."""
        return 1 if self.every is None else math.ceil(steps / self.every)


def run(
    shape: Shape, text: int, picture: int, conditions: Sequence[ConditionCost], steps: int
) -> int:
    """FLOPs of a whole run with one evaluation a step: the main branch and the conditions'."""
    tokens = sum(condition.tokens for condition in conditions)
    main = plain_step(shape, text, picture) + extra_attention(shape, text + picture, tokens)
    branches = sum(c.computations(steps) * branch(shape, text + picture, c) for c in conditions)
    return steps * main + branches


def ratio(
    shape: Shape, text: int, picture: int, conditions: Sequence[ConditionCost], steps: int
) -> float:
    """FLOPs of a run over those of the same run without conditions."""
    return run(shape, text, picture, conditions, steps) / run(shape, text, picture, (), steps)


def plain_step(shape: Shape, text: int, picture: int) -> int:
    """One evaluation of plain FLUX.

    Ends: P x 64 x h (picture in), T x text_width x h (text in), h x 2h (last modulation),
    P x h x 64 (picture out). Each block: the linears of N tokens, N^2 attention, and modulation
    (h x 6h for picture and text each in a double block, h x 3h in a single one).
    """
    return step(shape, text, picture, picture, text + picture, picture)


def step(shape: Shape, text: int, given: int, computed: int, keys: int, out: int) -> int:
    """As :func:`plain_step`, where not everything goes through the blocks.

    Args:
        given: tokens of picture and references that the first layer is given.
        computed: those of them that the blocks compute.
        keys: what these and the text attend to.
        out: tokens that the last layer is given.
    """
    h, n = shape.hidden, text + computed
    ends = linear_flops(given, PATCH, h) + linear_flops(text, shape.text_width, h)
    ends += linear_flops(1, h, 2 * h) + linear_flops(out, h, PATCH)
    block = _block_linears(shape, n) + attention_flops(shape, n, keys)
    modulation = shape.depth * 2 * linear_flops(1, h, 6 * h) + shape.depth_single * linear_flops(
        1, h, 3 * h
    )
    return vector_flops(shape) + ends + shape.blocks * block + modulation


@dataclass(frozen=True)
class EditCost:
    """A run of an editing model with one reference of the picture's size.

    Attributes:
        edited: tokens that a spot step computes; None leaves nothing of the picture out.
        full: steps that compute picture and reference whole; None are all.
    """

    text: int
    picture: int
    steps: int
    full: int | None = None
    edited: int | None = None

    def flops(self, shape: Shape) -> int:
        """Of the whole run, with one evaluation a step."""
        n, both = self.picture, 2 * self.picture
        whole = step(shape, self.text, both, both, self.text + both, both)
        full = self.steps if self.full is None else self.full
        edited = n if self.edited is None else self.edited
        others = step(shape, self.text, n, edited, self.text + both, n)
        return full * whole + (self.steps - full) * others


def extra_attention(shape: Shape, main: int, tokens: int) -> int:
    """What C condition tokens add to the main branch at every step: N x C attention, each block."""
    return shape.blocks * attention_flops(shape, main, tokens)


def branch(shape: Shape, main: int, condition: ConditionCost) -> int:
    """One run of a condition through the model.

    As the picture's tokens in :func:`plain_step`, with the LoRA's products. Its attention is
    C x (N + C) if joint and C x C if independent. The last single block stops at K/V: there is no
    attention, and of its linears only K and V's part of linear1 is run, h x 2h.
    """
    h, m, c, r = shape.hidden, shape.mlp, condition.tokens, condition.rank
    keys = main + c if condition.joint else c
    attention = (shape.blocks - 1) * attention_flops(shape, c, keys)

    double = _block_linears(shape, c) + linear_flops(1, h, 6 * h) + lora_flops(1, h, 6 * h, r)
    double += 4 * lora_flops(c, h, h, r) + lora_flops(c, m, h, r)  # q, k, v, out; MLP out
    single = _block_linears(shape, c)
    single += 3 * lora_flops(c, h, h, r) + lora_flops(c, h, m, r)  # q, k, v; MLP in
    single += lora_flops(c, h + m, h, r)
    last = linear_flops(c, h, 2 * h) + 2 * lora_flops(c, h, h, r)  # k, v
    modulation = linear_flops(1, h, 3 * h) + lora_flops(1, h, 3 * h, r)

    ends = vector_flops(shape) + linear_flops(c, PATCH, h) + lora_flops(c, PATCH, h, r)
    linears = shape.depth * double + (shape.depth_single - 1) * single + last
    linears += shape.depth_single * modulation
    return ends + linears + attention


def kv_bytes(shape: Shape, tokens: int, bytes_per_number: int) -> int:
    """K and V of condition tokens in all blocks: 2 x blocks x h numbers a token."""
    return 2 * shape.blocks * shape.hidden * tokens * bytes_per_number


def weights(shape: Shape, head: int = 128) -> int:
    """Numbers in the model's weights, biases and norms included.

    Args:
        head: width of one attention head; queries and keys have a norm of this width each.
    """
    h, m = shape.hidden, shape.mlp

    def layer(n_in: int, n_out: int) -> int:
        return n_in * n_out + n_out

    ends = sum(layer(n, h) + layer(h, h) for n in _embedded(shape))
    ends += layer(PATCH, h) + layer(shape.text_width, h) + layer(h, 2 * h) + layer(h, PATCH)
    attention = layer(h, 3 * h) + layer(h, h) + 2 * head
    double = 2 * (layer(h, 6 * h) + attention + layer(h, m) + layer(m, h))
    single = layer(h, 3 * h) + layer(h, 3 * h + m) + layer(h + m, h) + 2 * head
    return ends + shape.depth * double + shape.depth_single * single


def step_bytes(
    shape: Shape, tokens: int, weight_bytes: int, kv_number_bytes: int, head: int = 128
) -> int:
    """What a step has to read at least: all weights, and the K/V of condition tokens."""
    return weights(shape, head) * weight_bytes + kv_bytes(shape, tokens, kv_number_bytes)


def prefill(shape: Shape, conditions: Sequence[ConditionCost]) -> int:
    """FLOPs of computing independent conditions once, alone."""
    return sum(branch(shape, 0, condition) for condition in conditions)


def _block_linears(shape: Shape, tokens: int) -> int:
    """q, k, v and output h x 4h, MLP in and out h x 2m; the same in double and single blocks."""
    return linear_flops(tokens, shape.hidden, 4 * shape.hidden + 2 * shape.mlp)


def vector_flops(shape: Shape) -> int:
    """The modulation vector: two-layer embeddings of time, guidance and pooled text."""
    h = shape.hidden
    return sum(linear_flops(1, n, h) + linear_flops(1, h, h) for n in _embedded(shape))


def _embedded(shape: Shape) -> list[int]:
    """Widths of what is embedded: time, guidance if the model takes it, pooled text."""
    return [*[SINUSOID] * (1 + shape.guidance), shape.pooled_width]


def linear_flops(tokens: int, n_in: int, n_out: int) -> int:
    return 2 * tokens * n_in * n_out


def lora_flops(tokens: int, n_in: int, n_out: int, rank: int) -> int:
    """B(A x)."""
    return linear_flops(tokens, n_in, rank) + linear_flops(tokens, rank, n_out)


def attention_flops(shape: Shape, queries: int, keys: int) -> int:
    """Logits and weighted sum, over all heads together h wide."""
    return 2 * (2 * queries * keys * shape.hidden)

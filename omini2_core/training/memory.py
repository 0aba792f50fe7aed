"""What a run needs on a GPU: computed from the base's shape, not measured.

Weights as they are stored; LoRAs, their gradients and the optimiser's state in 32 bits; and what
the backward pass holds. With gradient checkpointing that is each block's input and, for one block
at a time, everything inside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open

from ..flux1.numbers import SHAPE, TEXT_TOKENS, TIME_WAVES, TOKEN_NUMBERS
from ..tokens.condition import TOKEN_PIXELS
from .base import HEAD_KEY, base_file, config_of, original_name
from .config import TrainConfig
from .lora_file import adapters, targets

# Bits a weight takes: nf4 has a 32-bit scale per 64 weights (bitsandbytes without double
# quantisation), int8 one 16-bit scale per row.
BITS = {"none": 16.0, "nf4": 4.5, "int8": 8.01}
STATE_NUMBERS = {"adamw": 2, "prodigy": 4}  # held per trained weight besides its gradient
# Numbers of one token that a block's backward pass needs, in multiples of the width: inputs and
# outputs of its linear layers, norms and attention, read off ``branch.py``.
INSIDE_BLOCK = 34
GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes on the GPU."""

    base: float
    lora: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.base + self.lora + self.activations


def memory_of(config: TrainConfig, shape: Mapping[str, int], quantize: str) -> Memory:
    """Computes what a run needs.

    Args:
        shape: the arguments of ``FluxTransformer2DModel``, as ``config_of`` gives them.
    """
    hidden = shape["num_attention_heads"] * shape["attention_head_dim"]
    blocks = shape["num_layers"], shape["num_single_layers"]
    bits = BITS[quantize] if config.mixed_precision == "bf16" or quantize != "none" else 32.0
    base = parameters(shape) * bits / 8
    trained = lora_parameters(config, hidden, blocks) * len(adapters(config))
    lora = trained * 4 * (2 + STATE_NUMBERS[config.optimizer.type])
    width = 2 if config.mixed_precision == "bf16" else 4
    token = hidden * width * config.batch_size * _tokens(config)
    once = config.gradient_checkpointing
    held = sum(blocks) + INSIDE_BLOCK if once else sum(blocks) * INSIDE_BLOCK
    return Memory(base, lora, token * held)


def parameters(shape: Mapping[str, int]) -> int:
    """How many weights a base has."""
    hidden = shape["num_attention_heads"] * shape["attention_head_dim"]
    h2 = hidden * hidden
    # Modulations, attentions (q, k, v, out) and MLPs: two of each, or one of each, fused.
    double = 2 * (6 * h2 + 4 * h2 + 8 * h2)
    single = 3 * h2 + 3 * h2 + 4 * h2 + 5 * h2
    width = (
        2 * TOKEN_NUMBERS
        + 2 * TIME_WAVES
        + shape["joint_attention_dim"]
        + shape["pooled_projection_dim"]
    )
    embedders = hidden * width + 5 * h2
    return shape["num_layers"] * double + shape["num_single_layers"] * single + embedders


def lora_parameters(config: TrainConfig, hidden: int, blocks: tuple[int, int]) -> int:
    """How many weights one LoRA has."""
    sides = {  # in and out, in multiples of the width
        "norm1.linear": 7,
        "norm1_context.linear": 7,
        "norm.linear": 4,
        "ff.net.0.proj": 5,
        "ff.net.2": 5,
        "ff_context.net.0.proj": 5,
        "ff_context.net.2": 5,
        "proj_mlp": 5,
        "proj_out": 6,
    }
    double, single, others = targets(config)
    count = sum(
        number * sum(sides.get(name, 2) for name in names)
        for number, names in zip(blocks, (double, single), strict=True)
    )
    return config.rank * (hidden * count + len(others) * (TOKEN_NUMBERS + hidden))


def _tokens(config: TrainConfig) -> int:
    sizes = [config.target_size]
    # Integration parts one picture's tokens; any other condition adds its own, at most these.
    sizes += [
        max(config.condition_sizes(i), key=lambda size: size[0] * size[1])
        for i, c in enumerate(config.conditions)
        if not c.integration
    ]
    return TEXT_TOKENS + sum(width * height // TOKEN_PIXELS**2 for width, height in sizes)


def shape_of(base: str) -> dict[str, int]:
    """A single file's shape from its header alone; FLUX.1's own for a diffusers folder."""
    path = base_file(base)
    if path.is_dir():
        return dict(SHAPE)
    with safe_open(path, framework="pt") as file:
        names = {original_name(key): key for key in file.keys()}
        with torch.device("meta"):
            tensors = {
                name: torch.empty(file.get_slice(key).get_shape()) for name, key in names.items()
            }
    return config_of(tensors) if HEAD_KEY in tensors else dict(SHAPE)


def statement(config: TrainConfig) -> str:
    """What the run needs, and what it would with FLUX.1's 12 billion weights."""
    lines = ["GPU memory in GB, computed, not measured (encoders run before and are freed):"]
    lines.append(f"{'base':24}{'weights':>10}{'LoRA':>8}{'activations':>13}{'total':>8}")
    for name, shape in ((config.base, shape_of(config.base)), ("FLUX.1, 12B", dict(SHAPE))):
        for kind in ("none", "int8", "nf4"):
            memory = memory_of(config, shape, kind)
            label = f"{name[-16:]}, {'bf16' if kind == 'none' else kind}"
            figures = memory.base, memory.lora, memory.activations, memory.total
            columns = [f"{value / GB:.2f}" for value in figures]
            widths = (10, 8, 13, 8)
            lines.append(
                f"{label:24}" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))
            )
    return "\n".join(lines)

"""The optimiser of a run, its learning rate, and its state in and out of checkpoints."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from .config import TrainConfig


def make_optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that a config names."""
    chosen = config.optimizer
    if chosen.type == "adamw":
        return torch.optim.AdamW(
            parameters, chosen.learning_rate, chosen.betas, weight_decay=chosen.weight_decay
        )
    from prodigyopt import Prodigy

    # As in the original's configs.
    optimizer: torch.optim.Optimizer = Prodigy(
        parameters,
        lr=chosen.learning_rate,
        betas=chosen.betas,
        weight_decay=chosen.weight_decay,
        use_bias_correction=True,
        safeguard_warmup=True,
    )
    return optimizer


def whole_state(optimizer: Any) -> dict[str, Any]:
    """An optimiser's state as one process has it; all processes have to ask for it together.

    Under FSDP each holds a part of every tensor. PyTorch's own ``get_optimizer_state_dict`` and its
    counterpart know neither weights without a gradient nor what Prodigy adds to its groups.
    """

    def whole(value: Any) -> Any:
        return value.full_tensor().cpu() if isinstance(value, DTensor) else value

    state: dict[str, Any] = tree_map(whole, optimizer.state_dict())
    return state


def load_whole_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Sets an optimiser's state from :func:`whole_state`, however many processes that had."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        if not isinstance(parameter, DTensor):
            continue
        for name, value in values.items():
            if isinstance(value, Tensor) and value.numel() == parameter.numel() > 1:
                # Prodigy keeps some of its state flat.
                like: Any = parameter if value.shape == parameter.shape else parameter.flatten()
                values[name] = distribute_tensor(value, like.device_mesh, like.placements)


def rate_factor(config: TrainConfig, step: int) -> float:
    """What the learning rate is multiplied by at a step, from 0."""
    warmup = config.optimizer.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.optimizer.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(config.steps - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * done))

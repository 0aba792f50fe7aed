"""How several processes train together, and which ways of starting them are refused."""

import os
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)
from torch import distributed

from ..errors import Omini2Error
from .config import TrainConfig


def make_accelerator() -> Accelerator:
    """Accelerate as this trainer needs it."""
    return Accelerator(
        # In the last block only keys and values of a condition matter, so some of its LoRA is
        # never used.
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            # While others wait, a process may encode many thousand pictures.
            InitProcessGroupKwargs(timeout=timedelta(hours=24)),
        ]
    )


def end_processes() -> None:
    """Ends what holds several processes together; without it their threads may abort the exit.

    For the end of a program that is the trainer's alone: in a host the group may be someone else's.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def require_usable(accelerator: Accelerator, config: TrainConfig) -> None:
    """Refuses ways of starting several processes that would not train what the config says.

    Raises:
        Omini2Error: processes that don't know of each other, or a model that FSDP can't share out.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > accelerator.num_processes:
        raise Omini2Error(
            f"{started} processes were started, but accelerate finds no GPUs for them and each "
            "would train on its own; start one with python -m omini2_core.training CONFIG.yaml, "
            "or set ACCELERATE_USE_CPU=1 to try several on the CPU."
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise Omini2Error(
            "FSDP's first version can't share out a base with LoRAs; set fsdp_version to 2 in the "
            "file that accelerate is started with, as omini2_core/training/accelerate/fsdp.yaml "
            "has it."
        )
    if config.quantize != "none":
        raise Omini2Error(
            f"quantize: FSDP can't share out a base in {config.quantize}; set it to none, or "
            "start with omini2_core/training/accelerate/ddp.yaml, where each GPU holds all of it."
        )

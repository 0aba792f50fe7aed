"""Tensors on their way from the computer's memory to a device, which nobody waits for.

A GPU copies from pinned memory while the processor goes on; from any other it makes it wait.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 64  # numbers; matrix products are fast where a matrix starts at a multiple of 16 bytes


def sent(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor on a device and in a format; itself if it is so already."""
    if device.type != "cuda" or t.device.type == "cuda":
        return t.to(device, dtype)
    return sent_together([t], device, dtype)[0]


def sent_together(
    tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Tensors of the computer's memory on a device and in a format, in one copy."""
    if device.type != "cuda" or not tensors:
        return [t.to(device, dtype) for t in tensors]
    sizes = [-(-t.numel() // ALIGNED) * ALIGNED for t in tensors]
    here = torch.empty(sum(sizes), dtype=dtype, pin_memory=True)
    for part, t in zip(here.split(sizes), tensors, strict=True):
        part[: t.numel()].copy_(t.flatten())
    there = here.to(device, non_blocking=True)
    parts = zip(there.split(sizes), tensors, strict=True)
    return [part[: t.numel()].view(t.shape) for part, t in parts]

"""A name for content: what is equal has the same one, whatever object holds it."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

Content = Tensor | str | float | int | bool | None


def digest(parts: Iterable[Content]) -> str:
    """Names a sequence of tensors (shape, format and every bit) and plain values."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype}{tuple(part.shape)}".encode())
            flat = part.detach().cpu().contiguous().flatten()
            total.update(flat.view(torch.uint8).numpy().data)
        else:
            total.update(f"{type(part).__name__}:{part!r}".encode())
        total.update(b"\0")
    return total.hexdigest()

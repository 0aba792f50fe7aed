"""Opening a safetensors file."""

from pathlib import Path
from typing import Any

from safetensors import safe_open


def open_tensors(path: Path) -> Any:
    """``safe_open``, to be used in a ``with``; reads nothing but the header.

    Raises:
        SafetensorError: damaged, or something else.
        OSError: it can't be opened, or is larger than what fits into memory.
    """
    try:
        return safe_open(path, framework="pt")
    except RuntimeError as error:  # PyTorch maps the whole file
        raise OSError(str(error)) from error

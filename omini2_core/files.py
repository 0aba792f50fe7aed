"""Files that are there as a whole or not at all, and whether one has changed."""

import glob
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import Omini2Error

PARTIAL = ".part"


@contextmanager
def whole_file(path: Path, name: str) -> Iterator[Path]:
    """A place to write a file to, which takes the file's own place once it is whole.

    Whenever the disk is full, the process killed or the power gone, what was at ``path`` is as it
    was. What a killed process left is removed by the next one that writes the same file.

    Args:
        name: the input that the file's place comes from.

    Raises:
        Omini2Error: it can't be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
            left.unlink(missing_ok=True)
        try:
            yield partial
            with partial.open("r+b") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise Omini2Error(
            f"{name}: {path} can't be written ({error}); make room on that disk, or let this "
            "program write there, and start it again."
        ) from error


def write_atomically(path: Path, data: bytes, name: str) -> None:
    """Writes a file through :func:`whole_file`."""
    with whole_file(path, name) as partial:
        partial.write_bytes(data)


def fingerprint(path: Path | None) -> str:
    """Another one whenever a file is written, replaced or removed."""
    try:
        stat = None if path is None else path.stat()
    except OSError:
        stat = None
    return "" if stat is None else f"{stat.st_mtime_ns} {stat.st_size}"


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

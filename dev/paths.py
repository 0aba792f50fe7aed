"""Where the project, its environment and the host are."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
HOST = CACHE / "comfyui"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_host(path: Path) -> bool:
    """Whether `path` looks like a ComfyUI checkout."""
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def host_path() -> Path:
    """The ComfyUI to run against: the checkout that COMFYUI_PATH names, else the pinned one."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        path = Path(named).expanduser().resolve()
        if not is_host(path):
            raise RuntimeError(
                f"COMFYUI_PATH is {named}, which is not a ComfyUI checkout "
                "(it has no main.py and comfy/): correct it or unset it."
            )
        return path
    if not is_host(HOST):
        raise RuntimeError("ComfyUI is not set up here yet: run `make setup`.")
    return HOST

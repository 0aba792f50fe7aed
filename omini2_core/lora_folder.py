"""ComfyUI's loras folder, and what its files say before they are loaded."""

from pathlib import Path

import folder_paths
from safetensors import SafetensorError

from .tensor_file import open_tensors


def lora_path(lora_name: str) -> Path | None:
    """A file that the host itself lists, or None: names come from outside and may be paths."""
    if lora_name not in folder_paths.get_filename_list("loras"):
        return None
    path = folder_paths.get_full_path("loras", lora_name)
    return None if path is None else Path(path)


def read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Keys and metadata of a safetensors file, without its tensors; none of a damaged one's."""
    try:
        with open_tensors(path) as file:
            return list(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError):
        return [], {}

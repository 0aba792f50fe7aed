"""Where the host keeps LoRAs and caches, and what their files say before they are loaded."""

from pathlib import Path

import folder_paths
from safetensors import SafetensorError

from ..files import open_tensors


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


FOLDER = "omini2_caches"


def register_folder() -> None:
    """Lists saved K/V as the host lists models: from its models and its output folder."""
    for parent in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(FOLDER, str(Path(parent) / FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = paths, {".safetensors"}


def cache_names() -> list[str]:
    """The files that there are."""
    if FOLDER not in folder_paths.folder_names_and_paths:
        register_folder()
    names: list[str] = folder_paths.get_filename_list(FOLDER)
    return names

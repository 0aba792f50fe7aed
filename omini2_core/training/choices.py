"""What Omini2 Train LoRA offers to choose from; apart from the trainer, which is slow to import."""

from pathlib import Path

import folder_paths

NONE, AUTO = "none", "auto"
DEMO_BASE, DEMO_PICTURES = "the demo model", "the demo pictures"
CONDITIONS = ("canny", "grey", "blur", "mask", "inpainting", "folder")
OPTIMIZERS = (AUTO, "prodigy", "adamw")
REFERENCES = ("off", "joint", "isolated")


def bases() -> list[str]:
    """The base models to choose from: the host's diffusion models that diffusers can hold."""
    files = folder_paths.get_filename_list("diffusion_models")
    return [DEMO_BASE, *(name for name in files if name.endswith(".safetensors"))]


def picture_folders() -> list[str]:
    """Folders in ComfyUI's input folder, two levels deep."""
    root = Path(folder_paths.get_input_directory())
    found = [p for pattern in ("*", "*/*") for p in root.glob(pattern) if p.is_dir()]
    return sorted(p.relative_to(root).as_posix() for p in found)

"""Starts ComfyUI inside a benchmark; before this nothing of the host may be imported."""

import os
import platform
from datetime import date
from pathlib import Path

import torch

from dev.load import load_extension, load_host


def start(device: str) -> None:
    """Makes the host and the extension importable, on "cpu", "cuda" or ("auto") what there is.

    PyTorch's attention is chosen, which is what the host takes on a GPU; on a CPU it would take
    an implementation of its own that is made for little memory.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no CUDA device here; use --device cpu.")
    load_host()
    from comfy.cli_args import args

    args.cpu = args.cpu or device == "cpu"
    args.use_pytorch_cross_attention = True
    load_extension()
    torch.set_num_threads(os.cpu_count() or 1)


def machine() -> str:
    """One line: processor, threads, versions, date."""
    import comfy.model_management
    import comfyui_version

    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{_cpu()}, {torch.get_num_threads()} threads"
    return (
        f"{processor}; torch {torch.__version__}, ComfyUI {comfyui_version.__version__}, "
        f"{date.today().isoformat()}"
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

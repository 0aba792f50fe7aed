"""Gets a process ready: the host, the extension, the tests' tools, a folder for LoRAs."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile

from dev import load


def start() -> None:
    """Before anything else of this package is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    load.load_host()
    load.load_extension()
    sys.path.append(str(load.ROOT / "tests"))
    import comfy.utils
    import folder_paths
    import torch

    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)
    logging.lastResort = None
    for handler in list(logging.getLogger().handlers):
        logging.getLogger().removeHandler(handler)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    folder = tempfile.mkdtemp(prefix="omini2_soak_")
    atexit.register(shutil.rmtree, folder, True)
    folder_paths.folder_names_and_paths["loras"][0].insert(0, folder)

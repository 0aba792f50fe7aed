"""What a process does: gets the host, the extension and the tests' tools ready, judges graphs."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from typing import Any

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


def one(seed: int, shrink: bool, oracle: str, number: int) -> tuple[Any, ...] | None:
    """A graph's number, oracle, outcome in three words, and program.

    None if it isn't of the oracle that was asked for.
    """
    import torch

    from dev.differential import check
    from dev.differential.draw import drawn

    with torch.inference_mode():
        name, graph = drawn(seed, number)
        if oracle not in ("", name):
            return None
        outcome = check.judge(name, graph)
        if outcome.what == check.FINDING and shrink:
            graph = check.smallest(name, graph, outcome.kind)
            outcome = check.judge(name, graph)
    words = outcome.what, outcome.kind, outcome.detail
    return number, name, *words, check.program(name, graph)

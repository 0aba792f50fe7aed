"""Starts the host as far as its nodes, then loads extensions: `python -m dev.host.start FOLDER`.

Takes several folders. Prints a line of JSON: for each how long it took, which modules came with it,
which nodes. In a process of its own, since a module is loaded only once.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dev.load import load_host
from dev.paths import ROOT


def loaded(*folders: Path) -> list[dict[str, Any]]:
    """What loading these extensions in a fresh host did, one after the other."""
    command = [sys.executable, "-m", "dev.host.start", *folders]
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # users' later starts find modules compiled
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"the host didn't start:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    load_host()
    # In main.py's order: `nodes` puts a folder on sys.path that hides the package `utils`.
    importlib.import_module("utils.extra_config")
    importlib.import_module("server")
    nodes = importlib.import_module("nodes")

    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    print(json.dumps([_load(folder, nodes) for folder in sys.argv[1:]]))


def _load(folder: str, nodes: Any) -> dict[str, Any]:
    modules, known = set(sys.modules), set(nodes.NODE_CLASS_MAPPINGS)
    wall, cpu = time.perf_counter(), time.process_time()
    succeeded = asyncio.run(nodes.load_custom_node(folder))
    return {
        "succeeded": succeeded,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "modules": sorted(set(sys.modules) - modules),
        "nodes": sorted(set(nodes.NODE_CLASS_MAPPINGS) - known),
    }


if __name__ == "__main__":
    main()

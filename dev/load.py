"""Makes the host importable and loads the extension the way the host does.

For tests and benchmarks. The host and this project both have something called `nodes`, so the
project's root must never be ahead of the host on `sys.path`: `load_host()` takes it out.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
# Finds `dev` also when this file is loaded by its path, and leaves sys.path as it was.
sys.path.insert(0, str(ROOT))
from dev.paths import host_path  # noqa: E402

sys.path.remove(str(ROOT))


def load_host() -> Path:
    """Put the host first on `sys.path`, set for the CPU where there is no CUDA; returns its path.

    Call it before importing anything of the host. Calling it again changes nothing.
    """
    host = host_path()
    hidden = {ROOT, host}
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() not in hidden]
    sys.path.insert(0, str(host))

    import torch
    from comfy.cli_args import args  # parses no command line unless the host's main.py asks it to

    if not torch.cuda.is_available():
        args.cpu = True  # read once, when comfy.model_management is imported
    return host


def load_extension(name: str = "omini2_extension") -> ModuleType:
    """Load the project's `__init__.py` by its path under `name`, as the host does.

    Its modules are then `{name}.omini2_core.condition` and so on. The same name gives the same
    module again.
    """
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    assert spec is not None and spec.loader is not None  # always so for a .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # or the next call would return a half-loaded module
        raise
    return module

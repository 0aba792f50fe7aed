"""Every test runs beside the host, with the extension loaded as the host loads it."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Threads that wait by spinning slow everything down where other work shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from compatibility import Recorder
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

_spec = importlib.util.spec_from_file_location("omini2_load", ROOT / "dev" / "load.py")
_load = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_load)
_load.load_host()
_load.load_extension()

# The models in the tests are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)
# The same examples on every run, and no deadline: PyTorch's first calls are slow.
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Tests do not depend on the order in which they run."""
    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def _inference_mode() -> Iterator[None]:
    """The host executes nodes this way."""
    with torch.inference_mode():
        yield


class _RootIsNoPackage:
    """Keeps pytest from importing the extension's `__init__.py` as a test package.

    As a plugin, since a conftest's own hooks don't reach the folder above it.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Dir | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_RootIsNoPackage())
    import comfyui_version

    folder = ROOT / "test_output" / "compatibility"
    config.pluginmanager.register(Recorder(folder, comfyui_version.__version__))

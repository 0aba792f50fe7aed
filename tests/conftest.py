"""Every test runs beside the host, with the extension loaded as the host loads it."""

import asyncio
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Threads that wait by spinning slow everything down where other work shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from helpers.compatibility import Recorder
from hypothesis import settings
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

_spec = importlib.util.spec_from_file_location("omini2_load", ROOT / "dev" / "load.py")
_load = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_load)
_load.load_host()
_load.load_extension()
# Not left on sys.path, where the project's `nodes` would hide the host's.
sys.path.insert(0, str(ROOT))
import benchmarks  # noqa: E402, F401

sys.path.remove(str(ROOT))

import folder_paths  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from tiny import flux_config, make_model, random_lora  # noqa: E402

from dev.host.prompts import ObjectInfo  # noqa: E402
from dev.host.server import Client, Server  # noqa: E402
from dev.workflows import demo  # noqa: E402
from omini2_extension.omini2_core.host import identity  # noqa: E402
from omini2_extension.omini2_core.host.folders import FOLDER, register_folder  # noqa: E402

# In the place of the host's folder, where processes that run tests side by side would meet.
LORAS = tempfile.TemporaryDirectory()
folder_paths.folder_names_and_paths["loras"][0][0] = LORAS.name
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


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> None:
    """K/V that another test of a file left on its model: equal up to rounding, not to the bit."""
    if "model" in request.fixturenames:
        model = request.getfixturevalue("model")
        if isinstance(model, ModelPatcher):
            identity.between_runs(model).clear()


@pytest.fixture(scope="module")
def model() -> ModelPatcher:
    """A tiny FLUX.1 dev with random weights, of one file's own."""
    return make_model(flux_config(True))


@pytest.fixture(scope="module")
def lora() -> str:
    """The lora_name of an OminiControl LoRA with random weights."""
    return random_lora("lora.safetensors")


@pytest.fixture(scope="module", params=["joint", "independent"])
def attention(request: pytest.FixtureRequest) -> str:
    """Each way in which an OminiControl LoRA's condition attends."""
    return request.param


@pytest.fixture
def cache_folder(tmp_path, monkeypatch) -> Path:
    """The folder for caches, in an output folder of one test's own."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    folder_paths.folder_names_and_paths.pop(FOLDER, None)
    register_folder()
    yield tmp_path / FOLDER
    folder_paths.folder_names_and_paths.pop(FOLDER, None)
    folder_paths.filename_list_cache.pop(FOLDER, None)


@pytest.fixture
def host_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's input, output and loras folders, with two pictures to train on."""
    pictures = tmp_path / "input" / "shapes"
    pictures.mkdir(parents=True)
    for name, colour in (("red", (220, 20, 20)), ("blue", (20, 20, 220))):
        Image.new("RGB", (64, 64), colour).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"a {name} square")
    (tmp_path / "loras").mkdir()
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    known = folder_paths.folder_names_and_paths["loras"]
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], known[1])
    )
    return tmp_path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The host's real server with the extension as a custom node: xdist_group("server")."""
    folder = tmp_path_factory.mktemp("server")
    demo.prepare_input(folder / "base")
    with Server(folder / "base", folder / "server.log") as running:
        yield running


@pytest.fixture(scope="session")
def info(server: Server) -> ObjectInfo:
    """The server's /object_info."""

    async def ask() -> ObjectInfo:
        async with Client(server) as client:
            return await client.object_info()

    return asyncio.run(ask())


@pytest.fixture
def loras(server: Server) -> Iterator[Path]:
    """The server's own loras folder; what a test puts there goes with it."""
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    yield folder
    for path in set(folder.iterdir()) - before:
        path.unlink()


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

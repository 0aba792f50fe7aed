"""A Chromium for the tests in the graph editor: one that is there, else one that is installed.

`.venv/bin/python -m dev.host.browser`, part of `make test`. Where none can be had, the tests in the
editor are skipped, except in CI (the environment variable CI), where that is an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The program of a Chromium on this machine, or Playwright's own."""
    for name in NAMES:
        path = shutil.which(name)
        if path:
            return path
    own = _of_playwright()
    return str(own) if own and own.is_file() else None


def ensure() -> str | None:
    """A Chromium, installed if need be; None if that failed. Says what it does."""
    found = find()
    if found:
        return found
    debian = shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0
    if debian:
        say("there is no Chromium: installing Debian's package")
        _run("apt-get", "update", "-qq")
        _run("apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium")
    if not find():
        say("there is no Chromium: installing Playwright's own into the user's cache")
        _run(sys.executable, "-m", "playwright", "install", "chromium")
    return find()


def required() -> bool:
    """Whether doing without is an error."""
    return os.environ.get("CI", "") not in ("", "0", "false")


def say(message: str) -> None:
    print(f"browser: {message}", flush=True)


def _of_playwright() -> Path | None:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        return Path(playwright.chromium.executable_path)


def _run(*command: str) -> None:
    # Its exit code doesn't matter: what counts is whether there is a browser in the end.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(command, stdin=subprocess.DEVNULL, env=environment, check=False)


def main() -> int:
    path = ensure()
    if path:
        say(path)
        return 0
    say("none could be installed, so the tests in the graph editor are left out.")
    return 1 if required() else 0


if __name__ == "__main__":
    sys.exit(main())

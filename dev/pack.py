"""The archive that the registry hands out: `python -m dev.pack FILE.zip`.

What git tracks without what .comfyignore names, as `comfy node pack` does it.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from dev.paths import ROOT


def packed_files() -> list[str]:
    """The archive's files, relative to the project's root."""
    ignored = ("--cached", "--ignored", "--exclude-from=.comfyignore")
    left_out = set(_git_files(*ignored))
    return [file for file in _git_files() if file not in left_out and (ROOT / file).is_file()]


def _git_files(*options: str) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, check=True, text=True
    )
    return listed.stdout.split("\0")[:-1]


def pack(path: Path) -> None:
    """Writes the archive."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in packed_files():
            archive.write(ROOT / file, file)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("Say where to: python -m dev.pack FILE.zip")
    pack(Path(sys.argv[1]))


if __name__ == "__main__":
    main()

"""What the extension adds to ComfyUI's start: `python -m benchmarks.imports`.

Each run is a fresh host that loads an empty extension, then this one, as it loads any custom node.
Runs with the archive just unpacked, whose modules Python has to compile first, alternate with runs
of the same folder as it is afterwards.
"""

import argparse
import json
import statistics
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dev.host.start import loaded
from dev.pack import pack

LIMIT = 0.150  # seconds that it may add
HEAVY = ("accelerate", "bitsandbytes", "datasets", "diffusers", "kornia", "matplotlib", "peft")


def measure(runs: int) -> dict[str, list[dict[str, Any]]]:
    """What each load did: of an empty extension, of this one at its first start and later."""
    found: dict[str, list[dict[str, Any]]] = {"empty": [], "first": [], "later": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack(folder / "omini2.zip")
        empty = folder / "empty"
        empty.mkdir()
        (empty / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
        for number in tqdm(range(runs), unit="pair"):
            ours = folder / f"omini2_{number}"
            with zipfile.ZipFile(folder / "omini2.zip") as archive:
                archive.extractall(ours)
            for kind in ("first", "later"):
                before, ran = loaded(empty, ours)
                found["empty"].append(before)
                found[kind].append(ran)
    return found


def report(found: dict[str, list[dict[str, Any]]]) -> str:
    """The figures as a table, and whether they hold."""
    lines = ["| loaded | ms | least to most | processor ms |", "|---|---|---|---|"]
    names = {
        "empty": "an empty extension",
        "first": "this one, first start",
        "later": "this one, later starts",
    }
    for kind, name in names.items():
        wall = [1000 * run["seconds"] for run in found[kind]]
        cpu = statistics.median(1000 * run["cpu_seconds"] for run in found[kind])
        spread = f"{min(wall):.0f} to {max(wall):.0f}"
        lines.append(f"| {name} | {statistics.median(wall):.0f} | {spread} | {cpu:.0f} |")
    later = statistics.median(run["seconds"] for run in found["later"])
    holds = "holds" if later <= LIMIT else "DOES NOT HOLD"
    lines.append(f"\nAt most {1000 * LIMIT:.0f} ms at later starts: {holds}.")
    heavy = sorted({m for run in found["later"] for m in run["modules"] if m in HEAVY})
    lines.append(f"Heavy modules that it brings: {', '.join(heavy) or 'none'}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures of each run here")
    args, _ = parser.parse_known_args()
    found = measure(args.runs)
    print(report(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

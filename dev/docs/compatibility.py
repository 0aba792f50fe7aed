"""Writes docs/compatibility.md from what the tests recorded: `python -m dev.docs.compatibility`.

They record one file a host in `test_output/compatibility`, see `tests/helpers/compatibility.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dev.paths import ROOT

PAGE = ROOT / "docs" / "compatibility.md"
RECORDED = ROOT / "test_output" / "compatibility"
AREAS = {
    "Hosts": "Versions of ComfyUI and what they bring.",
    "Models": "Base models, number formats and files.",
    "Editing models": "Reference images in Condition Cache, and what else is in the graph then.",
    "Neighbours": "What else is in the graph.",
    "Faults": "What goes wrong while it runs.",
}
INTRODUCTION = """\
# What it works with

Written by `python -m dev.docs.compatibility` from the outcomes that the tests record when they run
on a host: `make test` for the pinned ComfyUI, `COMFYUI_PATH=... make test` for another. Each column
is a version of ComfyUI. A verdict stands where every test of its row passed on that host, else
"failed"; "not run" where none of them ran there, mostly because that host has no such thing.

*works*: the picture is the one that theory asks for, as the tests compare it with the same run
without reuse, without the condition or without the neighbour. *works with a limit*: so too, but for
what the note says. *refused*: one sentence says why before the first step is done. The models are
tiny FLUX models in ComfyUI's own classes.
"""


@dataclass
class Row:
    """One row of the page.

    Attributes:
        outcomes: host version -> what its tests gave there.
    """

    verdict: str
    notes: list[str] = field(default_factory=list)
    outcomes: dict[str, set[str]] = field(default_factory=dict)

    def on(self, host: str) -> str:
        """What the page says for a host."""
        outcomes = self.outcomes.get(host, set())
        if "failed" in outcomes:
            return "**failed**"
        return self.verdict if "passed" in outcomes else "not run"


Rows = dict[tuple[str, str], Row]


def rows(recorded: list[dict[str, Any]]) -> Rows:
    """(area, name) -> row, of what the hosts' files hold.

    Raises:
        ValueError: two tests promise different things of one row.
    """
    found: Rows = {}
    for host in recorded:
        for test, results in host["tests"].items():
            for result in results:
                key = result["area"], result["name"]
                row = found.setdefault(key, Row(result["verdict"]))
                if row.verdict != result["verdict"]:
                    raise ValueError(f"{test}: {key[1]} is also said to be {row.verdict}")
                if result["note"] and result["note"] not in row.notes:
                    row.notes.append(result["note"])
                row.outcomes.setdefault(host["host"], set()).add(result["outcome"])
    return found


def page(recorded: list[dict[str, Any]]) -> str:
    """The whole page."""
    recorded = sorted(recorded, key=lambda host: version(host["host"]))
    hosts = [host["host"] for host in recorded]
    found = rows(recorded)
    parts = [INTRODUCTION]
    for area, title in AREAS.items():
        named = sorted((n, row) for (a, n), row in found.items() if a == area)
        if not named:
            continue
        parts.append(f"## {area}\n\n{title}\n")
        table = [["", *hosts, "note"], ["---"] * (len(hosts) + 2)]
        for name, row in named:
            table.append([name, *map(row.on, hosts), " ".join(row.notes)])
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n")
    return "\n".join(parts)


def version(text: str) -> tuple[int, ...]:
    """ "0.33.0" -> (0, 33, 0), to sort by."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def main() -> None:
    """Writes the page."""
    files = sorted(RECORDED.glob("*.json"))
    if not files:
        raise SystemExit(f"{RECORDED} holds nothing yet: run the tests first.")
    recorded = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    PAGE.write_text(page(recorded), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)} for ComfyUI {', '.join(h['host'] for h in recorded)}")


if __name__ == "__main__":
    main()

"""The nodes' contract with shared workflows, tests/contract.json: `python -m dev.quality.contract`.

What a workflow file or an API prompt depends on: ids, sockets, widgets in their order, what they
allow. Not what they say of themselves; that may be put better at any time.
"""

from __future__ import annotations

import json
from typing import Any

from dev.paths import ROOT

FILE = ROOT / "tests" / "contract.json"
KEPT = ("default", "min", "max", "step", "multiline", "options")
# Lists of the user's own files.
THEIR_FILES = {"lora_name", "cache_name", "base", "images", "condition_folder"}


def contract(info: dict[str, Any]) -> dict[str, Any]:
    """The part of a node's /object_info that has to stay."""
    return {
        "display_name": info["display_name"],
        "category": info["category"],
        "output_node": info["output_node"],
        "input": {
            section: {
                name: _input(name, *info["input"][section][name])
                for name in info["input_order"][section]
            }
            for section in ("required", "optional")
            if info["input"].get(section)
        },
        "output": [list(pair) for pair in zip(info["output_name"], info["output"], strict=True)],
    }


def _input(name: str, kind: Any, options: dict[str, Any] | None = None) -> list[Any]:
    kept = {key: value for key, value in (options or {}).items() if key in KEPT}
    if name in THEIR_FILES and "options" in kept:
        kept = {"options": "files"}
    return [str(kind), kept]


def contracts() -> dict[str, Any]:
    """Of all nodes, by id. The extension has to be loaded as `omini2_extension`."""
    from omini2_extension.nodes import NODES

    infos = [node.GET_NODE_INFO_V1() for node in NODES]
    return {info["name"]: contract(info) for info in infos}


def as_json(contracts: dict[str, Any]) -> str:
    return json.dumps(contracts, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    from dev.load import load_extension, load_host

    load_host()
    load_extension()
    FILE.write_text(as_json(contracts()), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

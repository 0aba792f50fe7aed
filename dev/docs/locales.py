"""Writes locales/en from the nodes' own words: `python -m dev.docs.locales`.

The other languages are translated by hand; tests hold them to the same nodes, inputs and outputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dev.paths import ROOT

FOLDER = ROOT / "locales"
LANGUAGES = ("en", "ja", "zh")


def node_definitions() -> dict[str, Any]:
    """The English texts, in the form of a locale's nodeDefs.json.

    The extension has to be loaded as `omini2_extension`.
    """
    from omini2_extension.nodes import NODES

    return {schema.node_id: _texts(schema) for schema in (node.define_schema() for node in NODES)}


def _texts(schema: Any) -> dict[str, Any]:
    texts: dict[str, Any] = {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {i.id: {"name": i.id, "tooltip": i.tooltip} for i in schema.inputs},
        "outputs": {
            str(number): {"name": output.display_name, "tooltip": output.tooltip}
            for number, output in enumerate(schema.outputs)
        },
    }
    return {key: value for key, value in texts.items() if value}


def read(language: str, name: str = "nodeDefs.json") -> Any:
    """One of a language's files."""
    return json.loads((FOLDER / language / name).read_text(encoding="utf-8"))


def main() -> None:
    from dev.load import load_extension, load_host

    load_host()
    load_extension()
    path: Path = FOLDER / "en" / "nodeDefs.json"
    text = json.dumps(node_definitions(), indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

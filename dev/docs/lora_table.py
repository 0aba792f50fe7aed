"""Writes the table of published LoRAs into the docs: `python -m dev.docs.lora_table`.

docs/loras.md and the part between two comments of the help page of Apply Omini2 LoRA, from
omini2_core/lora/presets.json, which the nodes read too.
"""

from __future__ import annotations

import json
from typing import Any

from dev import markdown
from dev.paths import ROOT

TABLE = ROOT / "omini2_core" / "lora" / "presets.json"
PAGE = ROOT / "docs" / "loras.md"
HELP = [ROOT / "web" / "docs" / f"Omini2ApplyLoRA{part}.md" for part in ("", "/ja", "/zh")]
BEGIN, END = "<!-- loras -->", "<!-- /loras -->"
BASES = {"dev": "FLUX.1-dev", "schnell": "FLUX.1-schnell"}
INTRODUCTION = """\
# The published condition LoRAs

What each is used with. Choosing a file in *Apply Omini2 LoRA* fills these in; every value can be
changed afterwards. Written by `python -m dev.docs.lora_table` from `omini2_core/lora/presets.json`,
which the node reads too.

"""
AFTER = """
*size* is the side of the condition image in pixels, *picture* that of the picture. Other sizes work
and are further from what the LoRA has seen. FLUX.1-schnell takes no guidance. *joint* conditions
also look at text and picture, so reusing their keys and values is an approximation; for
*independent* ones it is exact.

A file that *Omini2 Train LoRA* or the trainer has written says itself how it was trained, and that
is filled in. Any other file is told apart by its keys: EasyControl's run independent, all others as
OminiControl's, joint, with the placement and size that you set.

OminiControl and EasyControl have files of the same names. Which family a file is of, its keys say;
keep them apart in the folder by a prefix, as in `easycontrol_canny.safetensors`.
"""


def groups() -> list[dict[str, Any]]:
    """The table's groups of files that share their settings."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def table() -> str:
    """All settings, a line for each group and base model."""
    head = ("files", "from", "placement", "size, picture", "attention", "base", "steps",
            "guidance", "image guidance", "prompt")  # fmt: skip
    rows = []
    for group in groups():
        cells = [
            ", ".join(f"`{file}`" for file in group["files"]),
            f"{group['source']}, `{group['folder']}`",
            _placement(group),
            f"{group['size']}, {group['picture']}",
            group["attention"],
        ]
        for base, sampling in group["sampling"].items():
            guidance = sampling.get("guidance", "none")
            image_guidance = sampling.get("image_guidance_scale", "off")
            rest = BASES[base], sampling["steps"], guidance, image_guidance, group["prompt"]
            rows.append([*cells, *rest])
            cells = [""] * 5
    return markdown.table(head, rows) + "\n"


def _placement(group: dict[str, Any]) -> str:
    words = f"`{group['placement']}`"
    if group["placement"] == "custom":
        rows, columns = group["delta"]
        words += f", `delta_rows` {rows}, `delta_cols` {columns}"
    return words + (f", `resize` `{group['resize']}`" if "resize" in group else "")


def short_table() -> str:
    """What a help page, which is narrow, has room for."""
    rows = []
    for group in groups():
        files = ", ".join(f"`{file}`" for file in group["files"])
        sampling = "; ".join(
            f"{base} {s['steps']}, {s.get('guidance', 'none')}, "
            f"{s.get('image_guidance_scale', 'off')}"
            for base, s in group["sampling"].items()
        )
        owner = group["source"].partition("/")[2]
        rows.append((f"{owner}: {files}", _placement(group), sampling))
    head = "files", "placement", "steps, guidance, image guidance"
    return markdown.table(head, rows) + "\n"


def page() -> str:
    """docs/loras.md."""
    return INTRODUCTION + table() + AFTER


def with_table(text: str) -> str:
    """A help page with the table between its two comments."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{short_table()}{END}{after}"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
    for path in HELP:
        text = with_table(path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

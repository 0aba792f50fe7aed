"""Writes the table of published LoRAs into the docs: `python -m dev.docs.lora_table`.

docs/loras.md and the part between two comments of the help page of Apply Omini2 LoRA, from
omini2_core/lora/presets.json, which the nodes read too.
"""

from __future__ import annotations

import json
from typing import Any

from dev import markdown
from dev.paths import ROOT
from dev.workflows.files import HUGGING_FACE

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

"""
FAMILIES_TEXT = """
## Families

Files look alike and follow different rules. `family` in *Apply Omini2 LoRA* says whose:

"""
AFTER_FAMILIES = """
*prompt's* guidance is what *FluxGuidance* sets. *kept* ordinary LoRAs, those of *Load LoRA*, act on
the condition as on the picture; elsewhere they are taken off again for the condition.

`auto` goes by

1. what a file says of itself, as those of *Omini2 Train LoRA* and the trainer do;
2. its name, among the published files that its keys fit. OminiControl and UniCombine both have a
   `canny`, a `depth` and a `fill`, whose keys look alike: put a family's name before the file's, as
   in `unicombine_canny.safetensors`, or keep it in a folder called as its family, repository or
   folder there;
3. its keys: OminiControl's or EasyControl's.

Where that leaves more than one family, a warning names them and the one that was taken; setting
`family` settles it. Any spelling of keys that is a mere renaming is read (diffusers' names or
ComfyUI's own, prefixes, adapters' names, kohya's underscores); what is no plain LoRA is refused by
its own name, with where it goes instead.
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
            _source(group),
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


def notes() -> str:
    """What the table has no room for: what else is loaded, what isn't confirmed."""
    lines = []
    for group in groups():
        said = []
        if "second" in group:
            said.append(f"a second condition goes to {_placement(group['second'])}, size "
                        f"{group['second']['size']}")  # fmt: skip
        if "beside" in group:
            said.append(f"beside it {group['beside']}")
        if "unconfirmed" in group:
            said.append(f"not confirmed: {group['unconfirmed']}")
        if said:
            files = ", ".join(f"`{file}`" for file in group["files"])
            lines.append(f"- {group['family']}'s {files}: {'; '.join(said)}.")
    return "\n".join(lines) + "\n"


def families() -> str:
    """The families' switches; the extension has to be loaded as `omini2_extension`."""
    from omini2_extension.omini2_core.lora.family import FAMILIES

    head = ("family", "conditions see", "time", "guidance", "its LoRA acts on", "ordinary LoRAs",
            "positions")  # fmt: skip
    rows = []
    for family in FAMILIES:
        see = {
            ("joint", "independent"): "text and picture, or themselves only",
            ("joint",): "text and picture",
            ("independent",): "themselves only",
        }[family.attention]
        on = "condition and picture" if family.on_picture else "condition"
        on = f"{on}; what the file has for `{family.unused[0]}` is unused" if family.unused else on
        guidance = (
            "the prompt's" if family.branch_guidance is None else f"{family.branch_guidance:g}"
        )
        rows.append((
            f"`{family.name}`",
            f"{see}, and each other" if family.one_sequence else see,
            "the step's" if family.at_step else "0",
            guidance,
            "none of its own" if family.way is None else on,
            "kept" if family.keeps_ordinary else "taken off",
            "centred" if family.centred else "not centred",
        ))  # fmt: skip
    return markdown.table(head, rows) + "\n"


def _source(group: dict[str, Any]) -> str:
    """The page that the files are on, and the folder there."""
    link = f"[{group['source']}]({HUGGING_FACE}/{group['source']})"
    return link + (f", `{group['folder']}`" if group["folder"] else "")


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
    return INTRODUCTION + table() + AFTER + notes() + FAMILIES_TEXT + families() + AFTER_FAMILIES


def with_table(text: str) -> str:
    """A help page with the table between its two comments."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{short_table()}{END}{after}"


def main() -> None:
    from dev.load import load_extension, load_host

    load_host()
    load_extension()
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
    for path in HELP:
        text = with_table(path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

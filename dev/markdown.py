"""Tables of the pages that are written by a command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def row(cells: Iterable[object]) -> str:
    """One line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(head: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    """A table with this head."""
    return "\n".join([row(head), f"|{'---|' * len(head)}", *map(row, rows)])


def part_of(page: str, name: str) -> str:
    """What a page holds between the comments of this name; nothing if it has none."""
    _, _, rest = page.partition(f"<!-- {name} -->")
    return rest.partition(f"<!-- /{name} -->")[0].strip()


def marked(name: str, text: str) -> str:
    """A part of a page between the comments of this name."""
    return f"<!-- {name} -->\n{text}\n<!-- /{name} -->"


def with_part(page: str, name: str, text: str) -> str:
    """The page with another text between the comments of this name."""
    before, _, rest = page.partition(f"<!-- {name} -->")
    return before + marked(name, text) + rest.partition(f"<!-- /{name} -->")[2]

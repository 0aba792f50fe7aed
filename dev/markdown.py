"""Tables of the pages that are written by a command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def row(cells: Iterable[object]) -> str:
    """One line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(head: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    """A table with this head."""
    return "\n".join([row(head), f"|{'---|' * len(head)}", *map(row, rows)])

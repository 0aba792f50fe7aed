"""Writes docs/messages.md, every error and warning in one place: `python -m dev.docs.messages`.

Read from the source: the texts are where they are raised.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dev.paths import ROOT
from dev.quality.contract import FILE as CONTRACT

PAGE = ROOT / "docs" / "messages.md"
SOURCES = ("nodes", "omini2_core")
KINDS = {"Omini2Error": "error", "warn": "warning"}
# The trainer's config collects what is wrong, and pydantic puts the key before it.
CONFIG = "omini2_core/training/config.py"
CONFIG_KINDS = {"ValueError": "error", "wrong.append": "error"}
PUT_TOGETHER = re.compile(r"{[^{}]*}")  # of texts that are found where they are made
NAMED = re.compile(r"([a-z][\w.]*): ")
INTRODUCTION = """\
# What it says when something is wrong

Every error and warning of the extension, written by `python -m dev.docs.messages` from the source.
An error stops the run before it costs anything; with a warning it goes on. The word before the
colon is the input that it is about. `{...}` stands for what is known only then.
"""


@dataclass(frozen=True)
class Message:
    """One text and where it comes from."""

    kind: str
    text: str
    file: str
    function: str

    @property
    def named(self) -> str:
        """The input that it begins with, or nothing."""
        match = NAMED.match(self.text)
        return match[1] if match else ""


def messages() -> list[Message]:
    """All of them, file by file."""
    found = []
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += list(_in(tree, path.relative_to(ROOT).as_posix(), ""))
    return found


def _in(node: ast.AST, file: str, function: str) -> Iterator[Message]:
    for child in ast.iter_child_nodes(node):
        inside = function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = f"{function}.{child.name}".lstrip(".")
        if isinstance(child, ast.Call):
            name = ast.unparse(child.func)
            kind = KINDS.get(name.rpartition(".")[2]) or (file == CONFIG and CONFIG_KINDS.get(name))
            if kind and child.args:
                for text in _texts(child.args[0]):
                    if not PUT_TOGETHER.fullmatch(text):
                        yield Message(kind, text, file, function)
        yield from _in(child, file, inside)


def _texts(node: ast.expr) -> list[str]:
    """The strings that an expression can be, with what is put into them in braces."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body), *_texts(node.orelse)]
    if isinstance(node, ast.FormattedValue):
        return ["{" + _value(node.value) + "}"]
    if isinstance(node, ast.JoinedStr):
        return ["".join(_part(value) for value in node.values)]
    if isinstance(node, ast.BinOp):
        return [_part(node.left) + _part(node.right)]
    return ["{" + _value(node) + "}"]


def _part(node: ast.expr) -> str:
    """A piece of a string; a choice between two texts shows both."""
    choice = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(choice, ast.IfExp):
        return "[" + " / ".join(text.strip() for text in _texts(choice)) + "] "
    return "".join(_texts(node))


def _value(node: ast.expr) -> str:
    """A word for a value, from how the source calls it."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript):
        key = node.slice
        return str(key.value) if _is_word(key) else _value(node.value)
    if isinstance(node, ast.BinOp):
        return _value(node.right if isinstance(node.left, ast.Constant) else node.left)
    if isinstance(node, ast.Call) and len(node.args) >= 1:
        if isinstance(node.func, ast.Name) and node.func.id == "len":
            return f"number of {_value(node.args[0])}"
        first = node.args[0]
        return str(first.value) if _is_word(first) else _value(first)
    return ast.unparse(node)


def _is_word(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def page(found: list[Message]) -> str:
    """docs/messages.md."""
    nodes = json.loads(CONTRACT.read_text(encoding="utf-8"))
    training = [m for m in found if "/training/" in m.file]
    graph = [m for m in found if "/training/" not in m.file]
    by_input: dict[str, list[Message]] = {}
    for message in graph:
        by_input.setdefault(message.named, []).append(message)
    parts = [INTRODUCTION]
    for name in sorted(by_input, key=lambda name: (name == "", name)):
        on = [f"*{n['display_name']}*" for n in nodes.values() if name in _inputs(n)]
        title = f"`{name}`" if name else "Others"
        parts.append(f"## {title}\n\n" + (f"On {', '.join(on)}.\n\n" if on else ""))
        parts.append(_table(by_input[name]))
    parts.append("## Training\n\n" + _table(training))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _inputs(node: dict[str, dict[str, dict[str, object]]]) -> set[str]:
    return {name for section in node["input"].values() for name in section}


def _table(rows: list[Message]) -> str:
    lines = ["| | what it says | where |", "|---|---|---|"]
    for row in rows:
        text = row.text.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {row.kind} | {text} | `{Path(row.file)}`: `{row.function}` |")
    return "\n".join(lines) + "\n"


def main() -> None:
    PAGE.write_text(page(messages()), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

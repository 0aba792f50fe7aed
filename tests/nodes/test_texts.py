"""What people read: tooltips, locales, help pages, messages."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any

import pytest
from comfy_api.latest import io

from dev.docs import locales
from dev.paths import ROOT
from omini2_extension.nodes import NODES, common

SCHEMAS = {s.node_id: s for s in (node.define_schema() for node in NODES)}
HELP = ROOT / "web" / "docs"
TRANSLATED = [language for language in locales.LANGUAGES if language != "en"]


@pytest.mark.parametrize("node_id", SCHEMAS)
def test_every_node_input_and_output_is_explained(node_id: str) -> None:
    node = SCHEMAS[node_id]
    assert node.description and node.display_name
    assert node.category.split("/")[0] == "Omini2"
    for each in [*node.inputs, *node.outputs]:
        assert each.tooltip and each.tooltip.strip() == each.tooltip, each.id
        assert each.tooltip[-1] in ".)?", each.id


def test_aliases_are_given_where_the_host_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["kv cache"]
    plain: Any = common.schema(node_id="A", search_aliases=words)
    has = any(field.name == "search_aliases" for field in fields(io.Schema))
    assert getattr(plain, "search_aliases", None) == (words if has else None)

    for newer in (False, True):
        names = ["node_id", "search_aliases"] if newer else ["node_id"]
        monkeypatch.setattr(io, "Schema", make_dataclass("Schema", names))
        wanted = {"node_id": "A", "search_aliases": words} if newer else {"node_id": "A"}
        assert vars(common.schema(node_id="A", search_aliases=words)) == wanted


# --- locales -----------------------------------------------------------------------------------


def test_english_is_what_the_nodes_say() -> None:
    assert locales.read("en") == locales.node_definitions(), (
        "run python -m dev.docs.locales, and translate what has changed in locales/zh and ja"
    )


@pytest.mark.parametrize("language", TRANSLATED)
def test_translations_cover_the_nodes_and_nothing_else(language: str) -> None:
    english = dict(leaves(locales.node_definitions()))
    translated = dict(leaves(locales.read(language)))
    assert set(translated) == set(english)
    own = {key for key, text in translated.items() if re.search(r"[^\x00-\x7f]", text)}
    # Names that are the same everywhere stay as they are.
    assert {translated[key] for key in set(english) - own} <= {"VAE", "CLIP"}


@pytest.mark.parametrize("language", TRANSLATED)
def test_translations_name_the_same_choices(language: str) -> None:
    translated = locales.read(language)
    for node_id, node in SCHEMAS.items():
        for each in node.inputs:
            tooltip = translated[node_id]["inputs"][each.id]["tooltip"]
            for option in getattr(each, "options", None) or []:
                if re.search(rf"\b{re.escape(str(option))}\b", each.tooltip):
                    assert str(option) in tooltip, (node_id, each.id, option)


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_categories_have_names(language: str) -> None:
    parts = {part for node in SCHEMAS.values() for part in node.category.split("/")}
    assert set(locales.read(language, "main.json")["nodeCategories"]) == parts


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_no_text_has_letters_that_the_editor_takes_for_its_own(language: str) -> None:
    for key, text in leaves(locales.read(language)):
        assert not set(text) & set("{}@|"), key  # vue-i18n: places, links, plurals


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


# --- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("node_id", SCHEMAS)
@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_every_node_has_a_help_page_that_names_its_inputs(node_id: str, language: str) -> None:
    # The editor asks for <node>/<language>.md, then for <node>.md, which is the English one.
    path = HELP / (f"{node_id}.md" if language == "en" else f"{node_id}/{language}.md")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    if language != "en":
        assert text.startswith(f"# {locales.read(language)[node_id]['display_name']}\n")
    named = set(re.findall(r"`([^`]+)`", text))
    unnamed = {i.id for i in SCHEMAS[node_id].inputs} - named
    assert unnamed <= {"condition_folder", "learning_rate", "photo"}


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_every_help_page_has_the_nodes_picture(language: str) -> None:
    for node_id in SCHEMAS:
        path = HELP / (f"{node_id}.md" if language == "en" else f"{node_id}/{language}.md")
        [(words, file)] = re.findall(r"!\[([^\]]*)\]\((.+)\)", path.read_text(encoding="utf-8"))
        title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert title in words and words != title
        # The editor looks for it beside the English page, whatever the language.
        assert file == f"images/{node_id}.webp"
    pictures = list((HELP / "images").iterdir())
    assert {path.name for path in pictures} == {f"{node_id}.webp" for node_id in SCHEMAS}
    assert sum(path.stat().st_size for path in pictures) < 1e6


def test_there_are_no_help_pages_of_nodes_that_are_gone() -> None:
    pages = {path.relative_to(HELP).parts[0].removesuffix(".md") for path in HELP.rglob("*.md")}
    assert pages == set(SCHEMAS)


# --- messages ----------------------------------------------------------------------------------


SOURCES = ("nodes", "omini2_core")
KINDS = {"Omini2Error": "error", "warn": "warning"}
PUT_TOGETHER = re.compile(r"{[^{}]*}")  # of texts that are found where they are made
NAMED = re.compile(r"([a-z][\w.]*): ")


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


def messages(root: Path = ROOT) -> list[Message]:
    """All of them, read from the source, file by file."""
    found = []
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += list(_in(tree, path.relative_to(root).as_posix(), ""))
    return found


def _in(node: ast.AST, file: str, function: str) -> Iterator[Message]:
    for child in ast.iter_child_nodes(node):
        inside = function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = f"{function}.{child.name}".lstrip(".")
        if isinstance(child, ast.Call):
            name = ast.unparse(child.func)
            kind = KINDS.get(name.rpartition(".")[2])
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


def test_every_message_is_a_sentence_that_names_its_input() -> None:
    inputs = {i.id for node in SCHEMAS.values() for i in node.inputs}
    inputs |= {"cfg", "guidance"}  # ComfyUI's own nodes' (KSampler, FluxGuidance)
    for message in messages():
        if "/training/" in message.file:
            continue
        assert message.text.endswith("."), message
        anything = message.text[0].isupper() or message.text.startswith("{name}: ")
        assert message.named in inputs or anything, message
        assert re.search(r"[;:,(] ", message.text), message  # what is wrong, and a way out


def test_messages_in_all_forms_are_found(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "a.py").write_text(
        "class A:\n"
        "    def f(self, x):\n"
        "        warn('mask: ' 'plain.')\n"
        "        raise errors.Omini2Error(f'image: {x:g} is ' + str(x))\n"
    )
    found = messages(tmp_path)
    assert [(m.kind, m.text, m.named, m.function) for m in found] == [
        ("warning", "mask: plain.", "mask", "A.f"),
        ("error", "image: {x} is {x}", "image", "A.f"),
    ]
    assert json.dumps([m.file for m in found]) == '["nodes/a.py", "nodes/a.py"]'

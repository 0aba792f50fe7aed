"""What people read: tooltips, locales, help pages, messages."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any

import pytest
from comfy_api.latest import io

from dev.docs import locales, messages
from dev.paths import ROOT
from omini2_extension.nodes import NODES, schema

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
    plain: Any = schema.schema(node_id="A", search_aliases=words)
    has = any(field.name == "search_aliases" for field in fields(io.Schema))
    assert getattr(plain, "search_aliases", None) == (words if has else None)

    for newer in (False, True):
        names = ["node_id", "search_aliases"] if newer else ["node_id"]
        monkeypatch.setattr(io, "Schema", make_dataclass("Schema", names))
        wanted = {"node_id": "A", "search_aliases": words} if newer else {"node_id": "A"}
        assert vars(schema.schema(node_id="A", search_aliases=words)) == wanted


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


def test_the_page_of_messages_is_current() -> None:
    page = messages.page(messages.messages())
    assert messages.PAGE.read_text(encoding="utf-8") == page, "run python -m dev.docs.messages"


def test_every_message_is_a_sentence_that_names_its_input() -> None:
    inputs = {i.id for node in SCHEMAS.values() for i in node.inputs}
    for message in messages.messages():
        if "/training/" in message.file:
            continue
        assert message.text.endswith("."), message
        anything = message.text[0].isupper() or message.text.startswith("{name}: ")
        assert message.named in inputs or anything, message
        assert re.search(r"[;:,(] ", message.text), message  # what is wrong, and a way out


def test_messages_in_all_forms_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "a.py").write_text(
        "class A:\n"
        "    def f(self, x):\n"
        "        warn('mask: ' 'plain.')\n"
        "        raise errors.Omini2Error(f'image: {x:g} is ' + str(x))\n"
    )
    monkeypatch.setattr(messages, "ROOT", tmp_path)
    found = messages.messages()
    assert [(m.kind, m.text, m.named, m.function) for m in found] == [
        ("warning", "mask: plain.", "mask", "A.f"),
        ("error", "image: {x} is {x}", "image", "A.f"),
    ]
    assert json.dumps([m.file for m in found]) == '["nodes/a.py", "nodes/a.py"]'

"""The core as a house: what each folder may import, read from the imports themselves."""

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from dev.paths import ROOT

CORE = ROOT / "omini2_core"
# Each may import those before it; those of one step also each other, but in no circle.
STEPS = (
    {"errors", "files", "digest", "transfer"},
    {"tokens"},
    {"lora", "cache"},
    {"engine"},
    {"flux1"},
    {"host", "demo"},
    {"training"},
)
NUMBERS = "flux1.numbers"  # imports nothing, so whatever lies above tokens may have it
IMPORT_THE_HOST = {"host", "demo", "training"}
HOST = {
    "app", "comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths",
    "latent_preview", "node_helpers", "nodes", "server",
}  # fmt: skip
LINES, LOOSE_FILES = 450, 6


def names_of(path: Path, package: tuple[str, ...]) -> Iterator[str]:
    """What a file imports, wherever in it; its own package's modules with their full names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *(node.module.split(".") if node.module else ())))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def module_of(path: Path) -> str:
    """omini2_core/host/hooks.py -> host.hooks, omini2_core/host/__init__.py -> host."""
    parts = path.relative_to(CORE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path: Path) -> set[str]:
    """As `names_of`, in a file of the core."""
    return set(names_of(path, ("omini2_core", *path.relative_to(CORE).parts[:-1])))


FILES = {module_of(path): path for path in sorted(CORE.rglob("*.py"))}
IMPORTS = {module: imports_of(path) for module, path in FILES.items()}
WITHIN = {
    module: {
        name.removeprefix("omini2_core.")
        for name in names
        if name.startswith("omini2_core.") and name.removeprefix("omini2_core.") in FILES
    }
    - {module}
    for module, names in IMPORTS.items()
}


def circle(graph: dict[str, Iterable[str]]) -> list[str]:
    """One circle, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def folder_of(module: str) -> str:
    return module.partition(".")[0]


def folders() -> dict[str, set[str]]:
    """Which other folders each folder's modules import."""
    found: dict[str, set[str]] = {}
    for module, imported in WITHIN.items():
        others = {folder_of(name) for name in imported if name != NUMBERS}
        found.setdefault(folder_of(module), set()).update(others - {folder_of(module), ""})
    return found


def test_what_is_read_is_what_the_files_say(tmp_path: Path) -> None:
    """On a file whose imports are known."""
    lines = (
        "import a.b, c", "from . import d", "from ..e import f", "from ...g.h import i as j",
        "def k():", "    from .l import m",
    )  # fmt: skip
    (tmp_path / "x.py").write_text("\n".join(lines))
    assert set(names_of(tmp_path / "x.py", ("p", "q", "r"))) >= {
        "a.b", "c", "p.q.r.d", "p.q.e.f", "p.g.h.i", "p.q.r.l.m",
    }  # fmt: skip
    assert circle({"a": {"b"}, "b": {"c"}}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


def test_every_folder_has_a_step() -> None:
    known = set().union(*STEPS)
    assert {folder_of(module) for module in FILES} - {""} == known
    assert sum(map(len, STEPS)) == len(known)


def test_no_circle() -> None:
    assert circle(WITHIN) == []
    assert circle(folders()) == []


def test_imports_go_down() -> None:
    step = {folder: number for number, names in enumerate(STEPS) for folder in names}
    climbs = {
        f"{folder} imports {other}"
        for folder, others in folders().items()
        for other in others
        if folder and step[other] > step[folder]
    }
    assert climbs == set()
    assert IMPORTS[NUMBERS] <= {"__future__", "__future__.annotations"}


@pytest.mark.parametrize("module", [m for m in FILES if folder_of(m) not in IMPORT_THE_HOST])
def test_only_some_folders_know_the_host(module: str) -> None:
    assert {name.partition(".")[0] for name in IMPORTS[module]} & HOST == set()


def test_the_engine_names_no_model() -> None:
    for path in (CORE / "engine").rglob("*.py"):
        text = path.read_text(encoding="utf-8").lower()
        assert "double" not in text and "single" not in text, path.name


def test_files_are_short_and_in_folders() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert not {module: n for module, n in lengths.items() if n > LINES}
    assert len(list(CORE.glob("*.py"))) <= LOOSE_FILES

"""Whether the files that a model is made of say that references are to be isolated.

A model trained so has the same weights' names and shapes as one that isn't: only its file's name or
metadata tell. ComfyUI keeps neither on a MODEL as a rule, so they are looked up where a graph
names them.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
from comfy.model_patcher import ModelPatcher

from .folders import read_header

FOLDERS = ("diffusion_models", "checkpoints", "loras")
# FLUX.2 klein-9b-kv, and what ai-toolkit calls it.
NAME = re.compile(r"klein.*[-_.]kv(?![a-z])|kv[-_]cache", re.IGNORECASE)
# ai-toolkit's, and our trainer's.
SWITCHED_ON = re.compile(
    r'kv_cache[\\"\' ]*[:=][\\"\' ]*(true|1|yes)\b|omini2\.references": "isolated', re.IGNORECASE
)


def says_isolated(model: ModelPatcher, files: Sequence[Path]) -> bool:
    """Whether a file of a model or of a LoRA on it says that references see each other only.

    Args:
        files: those that the graph names.
    """
    loaded = getattr(model, "cached_patcher_init", None)  # newer hosts, for a model's own file
    given = loaded[1] if loaded else ()
    own = [Path(each) for each in given if isinstance(each, str)]
    return any(map(_says_isolated, {*own, *files}))


def _says_isolated(path: Path) -> bool:
    if NAME.search(path.name):
        return True
    _, metadata = read_header(path) if path.suffix == ".safetensors" else ([], {})
    return bool(SWITCHED_ON.search(json.dumps(metadata)))


def graph_files(node: Any) -> list[Path]:
    """The files of the nodes that a node's MODEL comes from; none outside of a graph."""
    hidden = getattr(node, "hidden", None)
    graph = getattr(hidden, "prompt", None)
    if not isinstance(graph, Mapping) or hidden is None:
        return []
    names = dict.fromkeys(_names_behind(graph, str(hidden.unique_id)))
    found = (_path(name) for name in names)
    return [path for path in found if path is not None]


def _names_behind(graph: Mapping[str, Any], start: str) -> Iterator[str]:
    """Texts in the inputs of all nodes that lead to a node's MODEL."""
    waiting, seen = [start], set()
    while waiting:
        number = waiting.pop()
        inputs = graph.get(number, {}).get("inputs", {})
        if number in seen or not isinstance(inputs, Mapping):
            continue
        seen.add(number)
        for value in inputs.values():
            if isinstance(value, str) and number != start:
                yield value
            elif _gives_a_model(graph, value):
                waiting.append(str(value[0]))


def _gives_a_model(graph: Mapping[str, Any], link: Any) -> bool:
    if not isinstance(link, list) or len(link) != 2 or not isinstance(link[1], int):
        return False
    known = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})  # the host's
    kind = known.get(graph.get(str(link[0]), {}).get("class_type"))
    given = getattr(kind, "RETURN_TYPES", ())
    return 0 <= link[1] < len(given) and given[link[1]] == "MODEL"


def _path(name: str) -> Path | None:
    """A file that the host itself lists: names come from outside and may be paths."""
    for folder in FOLDERS:
        if name in folder_paths.get_filename_list(folder):
            path = folder_paths.get_full_path(folder, name)
            return None if path is None else Path(path)
    return None

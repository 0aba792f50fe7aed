"""The templates for editing models do what they say, executed on tiny ones."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.editing import MODELS, Oracle, has
from helpers.reference import TinyVae
from helpers.templates import execute
from tiny import recorded_runs, relative_error

from dev.host.prompts import ObjectInfo, to_prompt
from dev.paths import ROOT

pytestmark = pytest.mark.xdist_group("server")

TOLERANCE = 1e-5
PICTURE = torch.full((1, 768, 1024, 3), 0.5)
CHANGES = {"text": "another prompt", "noise_seed": 2}


def every_5(step: int) -> bool:
    return step % 5 == 0


# Template -> its model, how many references, when they are computed; None where they are isolated.
TEMPLATES: dict[str, tuple[str, int, Callable[[int], bool] | None]] = {
    "kontext-edit": ("Kontext", 1, every_5),
    "flux2-klein-two-references": ("FLUX.2 klein", 2, every_5),
    "flux2-klein-9b-kv": ("FLUX.2 klein", 1, None),
    "qwen-image-edit-2511": ("Qwen 2511" if has("Krea2") else "Qwen", 1, every_5),
    "krea2-edit-lora": ("Krea 2", 1, every_5),
}


def prompt_of(name: str, info: ObjectInfo) -> dict[str, Any]:
    graph = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return to_prompt(graph, info)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_reuses_its_references_as_it_says(name: str, info: ObjectInfo) -> None:
    kind, many, refresh = TEMPLATES[name]
    if kind not in MODELS:
        pytest.skip("this host doesn't know its model")
    tiny, prompt = MODELS[kind], prompt_of(name, info)
    with recorded_runs() as runs:
        got = execute(prompt, tiny)
    (run,) = runs
    assert run.references is not None
    assert (run.references.count, run.references.isolated) == (many, refresh is None)
    by_hand = {"Omini2ConditionCache": lambda model, **_: Oracle(model, refresh).model}
    assert relative_error(got, execute(prompt, tiny, by_hand)) < TOLERANCE


def test_a_compact_reference_lies_on_the_picture_with_a_quarter_of_the_tokens(
    info: ObjectInfo,
) -> None:
    tiny, prompt = MODELS["Kontext"], prompt_of("kontext-compact-reference", info)
    instead = {
        "VAELoader": lambda **_: TinyVae(tiny),
        "EmptySD3LatentImage": lambda **_: {"samples": torch.zeros_like(tiny.latent(4, 8, 0))},
    }
    with recorded_runs() as runs:
        execute(prompt, tiny, instead)
    (run,) = runs
    assert run.references is not None
    assert (run.references.count, run.references.tokens) == (1, 4 * 8 / 4)
    assert run.references.spared == 1 - 4 / 20


def test_another_prompt_and_seed_compute_no_reference_of_klein_kv(info: ObjectInfo) -> None:
    """As its note says."""
    tiny, prompt = MODELS["FLUX.2 klein"], prompt_of("flux2-klein-9b-kv", info)
    model = tiny.make()
    loaded = {"UNETLoader": lambda **_: model, "LoadImage": lambda **_: PICTURE}
    other = copy.deepcopy(prompt)
    for node in other.values():
        node["inputs"] |= {k: v for k, v in CHANGES.items() if k in node["inputs"]}
    with recorded_runs(keep=True) as runs:
        execute(prompt, tiny, loaded)
        execute(other, tiny, loaded)
    assert [(run.refreshes, run.reused) for run in runs] == [(1, 0), (0, 1)]

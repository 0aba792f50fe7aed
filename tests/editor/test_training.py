"""Omini2 Train LoRA in the graph editor: what one sees before, while and after it trains."""

import copy
import json
import re
from itertools import pairwise
from typing import Any

import pytest
from in_editor import Editor, either_way

from dev.paths import ROOT

pytestmark = pytest.mark.xdist_group("editor")

KIND = "Omini2TrainLoRA"
TEMPLATE = json.loads(
    (ROOT / "example_workflows" / "train-demo-model.json").read_text(encoding="utf-8")
)
# What one must choose is in sight, the rest on demand.
CHOSEN = ["base", "images", "condition", "condition_folder", "steps", "lora_name"]
FOLDED = ["optimizer", "seed", "resume", "sample_every"]
# As release 0.1.0 saved it, with the editor's own "control after generate" behind the seed.
OLD = [
    *("the demo model", "none", "grey", "none", "joint", 128, 0.5, 1, 2, 40, 2, 8, "prodigy"),
    *(0.002, "nf4", 10, 7, "randomize", "old_name", False),
]


def new_node(editor: Editor, name: str) -> int:
    """A fresh node on an empty graph."""
    editor.load({**TEMPLATE, "nodes": [], "links": [], "groups": []}, name)
    node = editor.page.evaluate(
        """(kind) => {
          const node = LiteGraph.createNode(kind);
          app.graph.add(node);
          return node.id;
        }""",
        KIND,
    )
    editor.look_at(node)
    editor.page.wait_for_timeout(500)
    return node


def in_sight(editor: Editor, node: int) -> list[str]:
    """The inputs that the person sees on the node."""
    names = editor.node(node, "node.widgets.filter((w) => w.type !== 'button').map((w) => w.name)")
    if editor.renderer == "classic":
        seen = "node.widgets.filter((w) => node.isWidgetVisible(w)).map((w) => w.name)"
        shown = editor.node(node, seen)
    else:
        text = editor.page.locator(f"[data-node-id='{node}']").inner_text()
        shown = text.replace("control after generate", "control_after_generate").split("\n")
    return [name for name in names if name in shown and name != "omini2_panel"]


def press(editor: Editor, node: int, *words: str) -> None:
    """Presses the button that is called by one of these words."""
    if editor.renderer == "classic":
        editor.node(node, "node.widgets.find((w) => w.type === 'button').callback()")
    else:
        button = editor.page.locator(f"[data-node-id='{node}'] button")
        button.filter(has_text=re.compile("|".join(words), re.I)).click()
    editor.page.wait_for_timeout(500)


def test_what_one_must_choose_is_in_sight(editor: Editor) -> None:
    node = new_node(editor, "train")
    editor.screenshot("train-few")
    assert in_sight(editor, node) == CHOSEN
    if editor.renderer == "classic":  # one below the other, without a gap
        rows = editor.node(node, "node.widgets.filter((w) => !w.hidden).map((w) => w.y)")
        assert max(b - a for a, b in pairwise(rows)) < 30
    press(editor, node, "more options", "show advanced")
    editor.screenshot("train-all")
    assert {*CHOSEN, *FOLDED} <= set(in_sight(editor, node))
    editor.set_widget(node, "rank", 8)
    press(editor, node, "fewer options", "hide advanced")
    shown = in_sight(editor, node)
    # What isn't as usual stays in sight where we fold ourselves.
    folds = editor.renderer == "nodes2" and editor.node(node, "'hasAdvancedWidgets' in node")
    assert [each for each in shown if each != "rank"] == CHOSEN
    assert ("rank" in shown) == (not folds)


def test_the_seed_stays_after_a_run(editor: Editor) -> None:
    node = new_node(editor, "seed")
    assert editor.widget(node, "control_after_generate") == "fixed"
    [saved] = editor.serialized()["nodes"]
    assert saved["widgets_values"][17:19] == ["fixed", "my_condition"]


def test_a_file_of_the_first_release_opens_as_it_was(editor: Editor) -> None:
    graph = copy.deepcopy({**TEMPLATE, "links": [], "groups": []})
    graph["nodes"] = [node for node in graph["nodes"] if node["type"] == KIND]
    [node] = graph["nodes"]
    node["widgets_values"] = OLD
    del node["showAdvanced"]
    node["inputs"] = [{**slot, "link": None} for slot in node["inputs"]]
    node["outputs"] = [{**slot, "links": []} for slot in node["outputs"][:2]]
    editor.load(graph, "old")
    editor.look_at(node["id"])
    editor.page.wait_for_timeout(500)
    for name, value in (("size", 128), ("learning_rate", 0.002), ("lora_name", "old_name")):
        assert editor.widget(node["id"], name) == value
    assert editor.widget(node["id"], "control_after_generate") == "randomize"
    assert {"optimizer", "quantize", "seed"} <= set(in_sight(editor, node["id"]))
    [saved] = editor.serialized()["nodes"]
    assert saved["widgets_values"] == [*OLD, 100, "off"]


def short(name: str, **changes: Any) -> dict[str, Any]:
    """The template with a training of seconds, under a name of its own."""
    graph = copy.deepcopy(TEMPLATE)
    for node in graph["nodes"]:
        values = node["widgets_values"]
        if node["type"] == KIND:
            values[5], values[9], values[10], values[18], values[20] = 64, 4, 1, name, 2
            values[16] = changes.get("seed", 0)
            values[9] = changes.get("steps", 4)
        if node["type"] == "KSampler":
            values[2] = 1
    return graph


@either_way
def test_it_trains_and_the_graph_draws_with_it(editor: Editor) -> None:
    name = "trained"
    graph = short(name)
    (node,) = (node["id"] for node in graph["nodes"] if node["type"] == KIND)
    (lora,) = (node["id"] for node in graph["nodes"] if node["type"] == "Omini2ApplyLoRA")
    editor.load(graph, "trains")
    editor.look_at(node)
    editor.run()
    said = editor.wait_for_panel(node, "4 steps trained")
    assert "64x64, adamw 0.003" in said and "loss " in said
    editor.page.wait_for_timeout(1000)
    editor.screenshot("train-done")
    editor.look_at(lora)
    editor.wait_for_panel(lora, "256 tokens, independent")
    # Raised steps and another seed go on.
    editor.load(short(name, steps=6, seed=5), "goes-on")
    editor.look_at(node)
    editor.run()
    said = editor.wait_for_panel(node, "6 steps trained, went on from 4")
    assert "goes on with its own seed, 0" in said
    editor.fit()
    editor.page.wait_for_timeout(500)
    editor.screenshot("train-template")

"""What is said at a node, and the buttons that end it, as a person sees and presses them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from in_editor import Editor, either_way
from safetensors.torch import load_file, save_file

from dev.paths import ROOT
from dev.workflows import demo

pytestmark = pytest.mark.xdist_group("editor")

seeds = iter(range(5000, 6000))


def graph_of(name: str) -> dict[str, Any]:
    """A template of two steps with a seed of its own: nothing of an earlier run is served."""
    path = ROOT / "example_workflows" / f"{name}.json"
    graph = copy.deepcopy(json.loads(path.read_text(encoding="utf-8")))
    for node in graph["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][0], node["widgets_values"][2] = next(seeds), 2
    return graph


def only(graph: dict[str, Any], kind: str) -> int:
    """The id of the only node of a type."""
    (node,) = (node["id"] for node in graph["nodes"] if node["type"] == kind)
    return node


def opened(editor: Editor, name: str) -> dict[str, Any]:
    graph = graph_of(name)
    editor.load(graph, name)
    editor.fit()
    return graph


@either_way
def test_what_is_left_out_of_a_run_is_said(editor: Editor) -> None:
    """A preview of the edges runs on, and nothing else would tell that the picture doesn't."""
    graph = opened(editor, "try-it-without-a-checkpoint")
    encode, lora = only(graph, "Omini2ConditionEncode"), only(graph, "Omini2ApplyLoRA")
    editor.node(encode, "(node.mode = 2, app.canvas.setDirty(true, true))")
    editor.run()
    (said,) = (line for line in editor.notices(lora) if "Left out" in line)
    assert "condition: nothing is connected, or what is connected is muted" in said
    editor.screenshot("notice-muted")
    editor.node(encode, "(node.mode = 0, app.canvas.setDirty(true, true))")
    editor.node(lora, "node.disconnectInput(node.inputs.findIndex((i) => i.name === 'condition'))")
    editor.run()
    assert any("Left out" in line for line in editor.notices(lora))
    link = f"app.graph.getNodeById({encode}).connect(0, node, 'condition')"
    editor.node(lora, f"({link}, 1)")
    editor.run()
    editor.notice(lora).wait_for(state="detached")


@either_way
def test_a_missing_file_is_said_before_the_run(editor: Editor) -> None:
    graph = opened(editor, "try-it-without-a-checkpoint")
    lora = only(graph, "Omini2ApplyLoRA")
    editor.node(
        lora, "(node.widgets.find((w) => w.name === 'lora_name').value = 'gone.safetensors')"
    )
    editor.run()
    (said,) = (line for line in editor.notices(lora) if "Left out" in line)
    assert "lora_name: there is no gone.safetensors in ComfyUI's loras folder" in said


@either_way
def test_what_is_refused_is_said_at_the_node_too(editor: Editor) -> None:
    """The editor's own window is gone once it is closed."""
    graph = opened(editor, "inpainting-demo-model")
    compact, latent = (only(graph, kind) for kind in ("Omini2CompactTokens", "EmptySD3LatentImage"))
    editor.set_widget(latent, "width", 512)
    editor.command("Comfy.QueuePrompt")
    (said,) = (line for line in editor.notices(compact) if "Nothing was run" in line)
    assert "Nothing was run. condition: token integration needs a condition of the" in said
    editor.page.keyboard.press("Escape")
    editor.screenshot("notice-refused")
    editor.errors.clear()  # the server's answer, which the browser counts as one
    editor.set_widget(latent, "width", 256)
    editor.run()
    editor.notice(compact).wait_for(state="detached")


def loader(editor: Editor, name: str) -> int:
    """A stock Load LoRA beside the demo, with a file that somebody chooses."""
    return editor.page.evaluate(
        """(name) => {
          const node = LiteGraph.createNode("LoraLoaderModelOnly");
          node.pos = [900, -260];
          app.graph.add(node);
          const widget = node.widgets.find((w) => w.name === "lora_name");
          widget.value = name;
          widget.callback(name);
          return node.id;
        }""",
        name,
    )


def test_a_condition_lora_in_load_lora_is_said_there(editor: Editor, loras: Path) -> None:
    tensors = load_file(ROOT / "demo_model" / "loras" / demo.DEMO_LORA)
    save_file(tensors, loras / "canny.safetensors")
    save_file(tensors, loras / "unheard_of.safetensors")
    graph = opened(editor, "try-it-without-a-checkpoint")
    node = loader(editor, "omini2_demo_edges.safetensors")
    editor.fit()
    (said,) = editor.notices(node)[:1]
    assert "omini2_demo_edges.safetensors is a LoRA for conditions (OminiControl)" in said
    assert "choose it in Apply Omini2 LoRA" in said
    editor.screenshot("notice-load-lora")
    editor.set_widget(node, "lora_name", "unheard_of.safetensors")
    editor.notice(node).wait_for(state="detached")
    editor.set_widget(node, "lora_name", "canny.safetensors")
    assert "canny.safetensors is a LoRA for conditions" in editor.notices(node)[0]
    saved = editor.serialized()
    editor.load(saved, "again")  # a file that is opened says it as well
    assert "canny.safetensors is a LoRA for conditions" in editor.notices(node)[0]
    assert len(graph["nodes"]) + 1 == len(saved["nodes"])


@either_way
def test_a_doubt_about_the_family_is_settled_by_a_button(editor: Editor, loras: Path) -> None:
    tensors = load_file(ROOT / "demo_model" / "loras" / demo.DEMO_LORA)
    save_file(tensors, loras / "canny.safetensors")
    graph = opened(editor, "try-it-without-a-checkpoint")
    lora = only(graph, "Omini2ApplyLoRA")
    editor.set_widget(lora, "lora_name", "canny.safetensors")
    editor.run()
    assert any("may be OminiControl or UniCombine's" in line for line in editor.notices(lora))
    editor.screenshot("notice-family")
    editor.notice(lora).get_by_role("button", name="Set family to UniCombine").click()
    assert editor.widget(lora, "family") == "UniCombine"


def test_a_button_reaches_into_subgraphs(editor: Editor) -> None:
    graph = opened(editor, "try-it-without-a-checkpoint")
    lora, encode = only(graph, "Omini2ApplyLoRA"), only(graph, "Omini2ConditionEncode")
    editor.set_widget(encode, "placement", "right")
    # Of its own for each page: what the server has kept is not run, and so says nothing.
    editor.set_widget(lora, "condition_scale", next(seeds) % 100 / 50)
    editor.page.evaluate(
        """(ids) => {
          app.canvas.deselectAll();
          app.canvas.selectItems(ids.map((id) => app.graph.getNodeById(id)));
        }""",
        [lora, encode],
    )
    editor.command("Comfy.Graph.ConvertToSubgraph")
    outer = editor.page.evaluate("() => app.graph.nodes.find((n) => n.isSubgraphNode()).id")
    editor.fit()
    editor.run()
    path = f"{outer}:{encode}"
    assert any(line.startswith("placement: ") for line in editor.notices(path))
    editor.screenshot("notice-subgraph")
    editor.notice(path).get_by_role("button", name="Set placement to aligned").click()
    assert editor.node(path, "node.widgets.find((w) => w.name === 'placement').value") == "aligned"


def test_what_is_said_stays_text(editor: Editor) -> None:
    graph = opened(editor, "try-it-without-a-checkpoint")
    lora = only(graph, "Omini2ApplyLoRA")
    bad = '<img src="x" onerror="window.omini2Bad = 1">'
    detail = {"message": bad, "node": str(lora)}
    detail["remedies"] = [{"node": str(lora), "values": {"family": bad}}]
    editor.page.evaluate(
        "(detail) => app.api.dispatchCustomEvent('omini2.warning', detail)", detail
    )
    assert bad in editor.notices(lora)[0]
    assert editor.page.evaluate("() => window.omini2Bad ?? null") is None
    editor.notice(lora).get_by_role("button", name="Dismiss").click()
    editor.notice(lora).wait_for(state="detached")


def covered(editor: Editor, path: int) -> list[int]:
    """The nodes with a picture that a card lies over."""
    return editor.page.evaluate(
        """(path) => {
          const card = document.querySelector(`[data-testid=omini2_notice][data-at="${path}"]`);
          const box = card.getBoundingClientRect();
          const { left, top } = app.canvas.canvas.getBoundingClientRect();
          const { scale, offset } = app.canvas.ds;
          return app.graph.nodes.filter((node) => {
            if (!node.imgs?.length && !app.nodeOutputs?.[node.id]?.images?.length) return false;
            const [x, y, w, h] = node.boundingRect;
            const [l, t] = [left + (x + offset[0]) * scale, top + (y + offset[1]) * scale];
            return l < box.right && l + w * scale > box.left
              && t < box.bottom && t + h * scale > box.top;
          }).map((node) => node.id);
        }""",
        path,
    )


def test_a_button_sets_what_helps_and_can_be_undone(editor: Editor) -> None:
    graph = opened(editor, "try-it-without-a-checkpoint")
    encode = only(graph, "Omini2ConditionEncode")
    editor.set_widget(encode, "placement", "right")
    editor.run()
    (said,) = (line for line in editor.notices(encode) if line.startswith("placement: "))
    assert "set placement to aligned" in said
    assert covered(editor, encode) == []
    editor.screenshot("notice-placement")
    editor.notice(encode).get_by_role("button", name="Set placement to aligned").click()
    assert editor.widget(encode, "placement") == "aligned"
    editor.notice(encode).wait_for(state="detached")
    editor.command("Comfy.Undo")
    assert editor.widget(encode, "placement") == "right"
    editor.command("Comfy.Redo")
    assert editor.widget(encode, "placement") == "aligned"
    editor.run()
    editor.page.wait_for_timeout(300)
    assert editor.notice(encode).count() == 0


def misplaced(editor: Editor) -> tuple[int, int, list[str]]:
    """The edges' condition on the right, and run: its node, the sampler, what is said at it."""
    graph = opened(editor, "try-it-without-a-checkpoint")
    encode, sampler = only(graph, "Omini2ConditionEncode"), only(graph, "KSampler")
    editor.set_widget(encode, "placement", "right")
    # Of its own for each run: what the server has kept is not run, and so says nothing.
    scale = (1 + next(seeds) % 99) / 50
    editor.set_widget(only(graph, "Omini2ApplyLoRA"), "condition_scale", scale)
    editor.run()
    return encode, sampler, editor.notices(encode)


@either_way
def test_a_kept_result_keeps_its_warning(editor: Editor) -> None:
    encode, sampler, before = misplaced(editor)
    editor.set_widget(sampler, "seed", next(seeds))
    editor.run()
    editor.page.wait_for_timeout(300)
    assert editor.notices(encode) == before  # Apply Omini2 LoRA, which says it, wasn't run again
    editor.set_widget(encode, "placement", "aligned")  # by hand
    editor.notice(encode).wait_for(state="detached")


@either_way
def test_a_kept_result_keeps_its_warning_through_a_reload(editor: Editor) -> None:
    encode, sampler, before = misplaced(editor)
    saved = editor.serialized()
    editor.open()
    editor.load(saved, "reloaded")
    editor.set_widget(sampler, "seed", next(seeds))
    editor.run()
    assert editor.notices(encode) == before
    editor.set_widget(encode, "placement", "aligned")
    editor.run()  # Apply Omini2 LoRA speaks again, and has nothing to say
    editor.notice(encode).wait_for(state="detached")


@either_way
def test_the_demo_model_says_which_size_it_knows(editor: Editor) -> None:
    graph = opened(editor, "try-it-without-a-checkpoint")
    latent = only(graph, "EmptySD3LatentImage")
    for side in ("width", "height"):
        editor.set_widget(latent, side, 320)
    editor.run()
    (said,) = (line for line in editor.notices(latent) if "256x256 only" in line)
    assert "320x320" in said
    editor.screenshot("notice-size")
    editor.notice(latent).get_by_role("button", name="Set width to 256, height to 256").click()
    assert [editor.widget(latent, side) for side in ("width", "height")] == [256, 256]


def test_too_much_cfg_is_said_at_the_sampler(editor: Editor) -> None:
    graph = opened(editor, "try-it-without-a-checkpoint")
    sampler = only(graph, "KSampler")
    editor.set_widget(sampler, "cfg", 7)
    editor.run()
    assert any("cfg: 7 is too much for FLUX.1" in line for line in editor.notices(sampler))
    assert covered(editor, sampler) == []
    editor.screenshot("notice-cfg")
    editor.notice(sampler).get_by_role("button", name="Set cfg to 1").click()
    assert editor.widget(sampler, "cfg") == 1
    editor.notice(sampler).wait_for(state="detached")

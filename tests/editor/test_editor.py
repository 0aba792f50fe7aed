"""What a person sees: the host's editor in a real browser, with the real server behind it.

In both ways that the editor draws nodes. Screenshots are in ``test_output/editor``.
"""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_editor import Editor, either_way
from safetensors.torch import load_file, save_file

from dev.docs import thumbnails
from dev.host.editor import SIZE
from dev.host.server import Server
from dev.paths import ROOT
from dev.workflows import demo
from dev.workflows.graph import Graph
from dev.workflows.parts import cache, demo_model, prompt, sample_latent, square

pytestmark = pytest.mark.xdist_group("editor")

TEMPLATES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "example_workflows").glob("*.json"))
}
TRY_IT, USES_CACHE = "try-it-without-a-checkpoint", "use-saved-cache-demo-model"
DEMOS = [
    name
    for name, graph in TEMPLATES.items()
    if any(node["type"] == "Omini2DemoModel" for node in graph["nodes"])
]


def covering(names: list[str]) -> list[str]:
    """As few of the templates as have every one of our nodes that any of them has."""
    ours = {
        name: {n["type"] for n in TEMPLATES[name]["nodes"] if n["type"].startswith("Omini2")}
        for name in names
    }
    found: list[str] = []
    while left := set().union(*ours.values()) - set().union(*(ours[name] for name in found)):
        found.append(max(names, key=lambda name: len(ours[name] & left)))
    return found


PANELS = {
    "Omini2ApplyLoRA": "tokens", "Omini2ConditionCache": "K/V", "Omini2CompactTokens": "→",
    "Omini2TrainLoRA": "2 steps trained",
}  # fmt: skip
LORAS = {path.name for path in (ROOT / "demo_model" / "loras").iterdir()}
LOADED = "(picture) => picture.decode().then(() => picture.naturalWidth)"
HELP = sorted(path.stem for path in (ROOT / "web" / "docs").glob("Omini2*.md"))


def template(name: str) -> dict[str, Any]:
    """A template of two steps, with a seed of its own: nothing of an earlier run is served."""
    graph = copy.deepcopy(TEMPLATES[name])
    template.seed += 1
    for node in graph["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][0] = template.seed
            node["widgets_values"][2] = 2
        if node["type"] == "Omini2TrainLoRA":  # size and steps
            node["widgets_values"][5], node["widgets_values"][9] = 64, 2
        # As in the demo: where a LoRA isn't at hand, the one that ships takes its place.
        if node["type"] == "Omini2ApplyLoRA" and node["widgets_values"][0] not in LORAS:
            node["widgets_values"][0] = demo.DEMO_LORA
    return graph


template.seed = 1000


def of_type(graph: dict[str, Any], kind: str) -> list[int]:
    return [node["id"] for node in graph["nodes"] if node["type"] == kind]


def linked_files(graph: dict[str, Any]) -> list[str]:
    """The files that a template says where to find."""
    return [m["name"] for n in graph["nodes"] for m in n["properties"].get("models", [])]


# --- templates ---------------------------------------------------------------------------------


@pytest.fixture
def common(page: Editor) -> Iterator[None]:
    """A window of a common size."""
    page.page.set_viewport_size(WINDOW)
    yield
    page.page.set_viewport_size(SIZE)


@pytest.mark.compatibility("Hosts", "Templates open in the graph editor", "works", "")
@pytest.mark.parametrize("name", TEMPLATES)
def test_template_opens(editor: Editor, common: None, name: str) -> None:
    graph = TEMPLATES[name]
    editor.load(graph, name)
    opened = editor.serialized()
    assert len(opened["nodes"]) == len(graph["nodes"])
    assert len(opened["links"]) == len(graph["links"])
    unknown = "app.graph.nodes.filter((n) => !LiteGraph.registered_node_types[n.type])"
    # Newer editors mark a loader whose file isn't on this machine.
    red = """app.graph.nodes.filter((n) =>
        (n.has_errors || n.inputs.some((i) => i.hasErrors)) && !n.widgets?.some((w) =>
          Array.isArray(w.options?.values) && !w.options.values.includes(w.value)))"""
    loose = """app.graph.nodes.filter((n) =>
        Object.keys(n.constructor.nodeData?.input?.required ?? {}).some((name) =>
          !n.widgets?.some((w) => w.name === name)
            && n.inputs.find((i) => i.name === name)?.link == null))"""
    for bad in (unknown, red, loose):
        assert editor.page.evaluate(f"() => {bad}.map((n) => n.type)") == []
    dialog, links = editor.page.locator(".p-dialog"), linked_files(graph)
    if links and dialog.count():  # older editors offer to fetch at once what isn't there
        assert all(name in dialog.inner_text() for name in links)
        editor.page.keyboard.press("Escape")
        dialog.wait_for(state="detached")
    assert dialog.count() == 0
    for node in graph["nodes"]:  # newer hosts may have more values behind those that we know
        (same,) = (n for n in opened["nodes"] if n["id"] == node["id"])
        known = node["widgets_values"]
        assert same.get("widgets_values", [])[: len(known)] == known
    editor.screenshot(name)
    assert_clear(editor)


# Where the editor's own bars end, in a window of a common size, and where messages come up.
WINDOW, BARS, MESSAGES = {"width": 1920, "height": 960}, (60, 70), 215
PLACES = """() => {
  const { scale, offset } = app.canvas.ds;
  const at = (box) => [(box[0] + offset[0]) * scale, (box[1] + offset[1]) * scale,
    (box[0] + box[2] + offset[0]) * scale, (box[1] + box[3] + offset[1]) * scale];
  return app.graph.nodes.map((n) => [n.type, ...at(n.boundingRect)]);
}"""


def assert_clear(editor: Editor) -> None:
    """Without anybody's moving the view: what there is to read, and where the picture will be."""
    places = editor.page.evaluate(PLACES)
    assert min(x for _, x, *_ in places) > BARS[0] and min(y for _, _, y, *_ in places) > BARS[1]
    (result,) = (box for kind, *box in places if kind == "SaveImage")
    left, top, right, bottom = result
    assert top > MESSAGES
    seen = (min(right, WINDOW["width"]) - left) * (min(bottom, WINDOW["height"]) - top)
    assert seen > 0.7 * (right - left) * (bottom - top)


@pytest.mark.compatibility("Hosts", "Demo templates run in the graph editor", "works", "")
@pytest.mark.parametrize("name", DEMOS)
def test_demo_template_runs(editor: Editor, server: Server, name: str) -> None:
    if editor.renderer != "classic" and name not in covering(DEMOS):
        pytest.skip("What is drawn otherwise are our nodes, and others have each of these.")
    graph = template(name)
    if name == USES_CACHE and not (server.base / "output" / "omini2_caches").exists():
        editor.load(template("save-cache-demo-model"), "first")
        editor.run()
    editor.load(graph, name)
    editor.run()
    (save,) = of_type(graph, "SaveImage")
    shown = f"[data-node-id='{save}'] img"
    if editor.renderer == "classic":
        editor.page.wait_for_function(
            f"() => app.graph.getNodeById({save}).imgs?.[0]?.naturalWidth >= 256"
        )
    else:
        editor.fit()
        editor.page.wait_for_function(f'() => document.querySelector("{shown}")?.naturalWidth > 0')
    editor.fit()
    editor.screenshot(f"{name}.run")
    for kind, words in PANELS.items():
        for node in of_type(graph, kind):
            editor.look_at(node)
            editor.wait_for_panel(node, words)
    for node in of_type(graph, "Omini2ApplyLoRA"):
        count = "node.widgets.find((w) => w.name === 'omini2_panel').element"
        assert editor.node(node, f"{count}.querySelectorAll('svg').length") == 1


# --- figures -----------------------------------------------------------------------------------


def recomputed(graph: dict) -> dict:
    """The graph with joint conditions, which every run computes again: twice in six steps."""
    for node in graph["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 6
        if node["type"] == "Omini2ApplyLoRA":
            values = node["widgets_values"]
            values[values.index("auto")] = "joint"  # attention, before family
    return graph


def run_try_it(editor: Editor, name: str) -> tuple[int, int]:
    """Opens and runs the first template; Apply Omini2 LoRA's id and Condition Cache's."""
    graph = recomputed(template(TRY_IT))
    (lora,), (cache,) = of_type(graph, "Omini2ApplyLoRA"), of_type(graph, "Omini2ConditionCache")
    editor.load(graph, name)
    editor.look_at(lora)
    editor.run()
    editor.wait_for_panel(lora, "256 tokens, joint\nover the picture")
    editor.wait_for_panel(cache, "computed 2 times in 6 steps")
    editor.page.wait_for_timeout(500)  # until the editor has measured what grew
    return lora, cache


def with_a_reference(references: str, picture: str) -> dict[str, Any]:
    """The demo model with a reference latent, as FLUX.1 Kontext takes it: 256 tokens."""
    graph = Graph("reference")
    models = demo_model(graph)
    photo = square(graph, graph.add("Omini2DemoImage", picture), 256)
    latent = graph.add("VAEEncode", pixels=photo, vae=models.vae)
    encode, *_ = prompt(graph, models.clip, "a big red ring on a grey background", 3.5)
    positive = graph.add("ReferenceLatent", conditioning=encode, latent=latent)
    kept = cache(graph, models.nodes[0], references)
    sampling = sample_latent(graph, kept, [positive, positive], models.vae, latent, 6)
    looked_at = graph.add("PreviewImage", images=sampling[-1])
    for column, node in enumerate((models.nodes[0], positive, kept, *sampling[1:], looked_at)):
        graph.stack(column, 0, "", node)
    return graph.as_dict()


@pytest.mark.parametrize("references", ["joint", "isolated"])
def test_the_cache_says_what_it_did_with_references(editor: Editor, references: str) -> None:
    # One of its own for each page: what is isolated is kept for the next run.
    picture = {"classic": "scene", "nodes2": "scene-thing"}[editor.renderer]
    graph = with_a_reference(references, picture)
    (kept,) = of_type(graph, "Omini2ConditionCache")
    editor.load(graph, references)
    editor.look_at(kept)
    editor.run()
    said = editor.wait_for_panel(kept, f"1 reference, 256 tokens, {references}")
    times, saved = ("2 times", 67) if references == "joint" else ("once", 83)
    assert f"computed {times} in 6 steps" in said and f"{saved} % of their work saved" in said
    assert ("K/V moved by" in said) == (references == "joint")
    editor.page.wait_for_timeout(500)  # until the node has grown
    editor.screenshot(f"references-{references}")


@either_way
def test_the_bar_of_the_cache_leaves_the_samplers_alone(editor: Editor) -> None:
    graph = recomputed(template(TRY_IT))
    editor.load(graph, "bars")
    seen = [e["detail"]["nodes"] for e in editor.run() if e["kind"] == "progress_state"]
    (sampler,), (cache,) = of_type(graph, "KSampler"), of_type(graph, "Omini2ConditionCache")
    steps = [n[str(sampler)] for n in seen if n.get(str(sampler), {}).get("state") == "running"]
    values = [state["value"] for state in steps]
    assert values == sorted(values) and {s["max"] for s in steps} <= {1, 6}
    moves = [
        (n[str(cache)]["value"], n[str(cache)]["max"])
        for n in seen
        if n.get(str(cache), {}).get("state") == "running" and str(sampler) in n
    ]
    assert any(0 < value < most for value, most in moves)
    assert seen[-1][str(cache)]["state"] == "finished"


def test_figures_survive_save_and_reload(editor: Editor, server: Server) -> None:
    if editor.renderer != "nodes2":
        pytest.skip("The editor keeps files alike, however it draws them: one reload each.")
    lora, cache = run_try_it(editor, "to-save")
    name = f"saved-{editor.renderer}"
    before = editor.serialized()
    editor.page.evaluate("() => void app.extensionManager.command.execute('Comfy.SaveWorkflowAs')")
    field = editor.page.locator(".prompt-dialog-content input")
    field.fill(name)
    field.press("Enter")
    path = server.base / "user" / "default" / "workflows" / f"{name}.json"
    wait_until(editor, path.exists)
    editor.page.wait_for_function(
        f"() => app.extensionManager.workflow.activeWorkflow.path.endsWith('{name}.json')"
    )
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert meaning(saved) == meaning(before)
    values = {node["id"]: node["widgets_values"] for node in template(TRY_IT)["nodes"]}
    for node in saved["nodes"]:  # what a run said is beside the workflow's values, not among them
        assert len(node.get("widgets_values", [])) == len(values[node["id"]])
    said = [editor.panel(lora), editor.panel(cache)]
    editor.open()
    editor.page.wait_for_function(f"() => app.graph.getNodeById({lora})")
    editor.look_at(lora)
    editor.wait_for_panel(lora, "256 tokens")
    assert [editor.panel(lora), editor.panel(cache)] == said
    assert meaning(editor.serialized()) == meaning(saved)


@either_way
def test_figures_survive_a_reload_without_saving(editor: Editor) -> None:
    lora, _ = run_try_it(editor, "draft")
    editor.page.wait_for_function(  # until the editor has written its draft
        """(seed) => [localStorage, sessionStorage].flatMap(Object.values)
          .some((kept) => kept.includes(seed) && kept.includes("figures"))""",
        arg=str(template.seed),
    )
    editor.open()
    editor.page.wait_for_function(f"() => app.graph.getNodeById({lora})")
    editor.look_at(lora)
    editor.wait_for_panel(lora, "256 tokens")


def test_a_run_is_no_step_of_undo_and_survives_it(editor: Editor) -> None:
    graph = template(TRY_IT)
    (lora,), (cache,) = of_type(graph, "Omini2ApplyLoRA"), of_type(graph, "Omini2ConditionCache")
    editor.load(graph, "undo")
    editor.look_at(lora)
    editor.set_widget(lora, "condition_scale", 0.9)
    editor.run()
    editor.wait_for_panel(lora, "256 tokens")
    wait_until(editor, lambda: not {lora, cache} & changed(editor))
    # Nodes 2.0 itself takes the growth of a node that shows a picture for a change.
    for command, value in (("Comfy.Undo", 1.0), ("Comfy.Redo", 0.9)):
        for _ in range(2):
            if editor.widget(lora, "condition_scale") != value:
                editor.command(command)
        assert editor.widget(lora, "condition_scale") == value
        editor.wait_for_panel(lora, "256 tokens")


def changed(editor: Editor) -> set[int]:
    """The nodes in which the editor would notice a change that can be undone.

    Apart from places: Nodes 2.0 moves nodes by a ten thousandth of a pixel as it measures them.
    """
    known, now = editor.page.evaluate(
        """() => [app.extensionManager.workflow.activeWorkflow.changeTracker.activeState,
          app.graph.serialize()].map((state) => JSON.parse(JSON.stringify(state.nodes)))"""
    )
    for node in [*known, *now]:
        del node["pos"]
    before = {node["id"]: node for node in known}
    return {node["id"] for node in now if node != before.get(node["id"])}


def test_figures_survive_copy_and_paste(editor: Editor) -> None:
    lora, _ = run_try_it(editor, "copy")
    editor.page.evaluate(
        """(id) => {
          app.canvas.deselectAll();
          app.canvas.select(app.graph.getNodeById(id));
          app.canvas.copyToClipboard();
          app.canvas.pasteFromClipboard();
        }""",
        lora,
    )
    (pasted,) = set(editor.of_type("Omini2ApplyLoRA")) - {lora}
    editor.look_at(pasted)
    editor.wait_for_panel(pasted, "256 tokens, joint")
    assert editor.panel(pasted) == editor.panel(lora)


def test_figures_reach_into_subgraphs(editor: Editor) -> None:
    graph = recomputed(template(TRY_IT))
    (lora,), (cache,) = of_type(graph, "Omini2ApplyLoRA"), of_type(graph, "Omini2ConditionCache")
    editor.load(graph, "subgraph")
    editor.page.evaluate(
        """(ids) => {
          app.canvas.deselectAll();
          app.canvas.selectItems(ids.map((id) => app.graph.getNodeById(id)));
        }""",
        [lora, cache],
    )
    editor.command("Comfy.Graph.ConvertToSubgraph")
    outer = editor.page.evaluate("() => app.graph.nodes.find((n) => n.isSubgraphNode()).id")
    (run,) = [e["detail"] for e in editor.run() if e["kind"] == "omini2.run"]
    assert set(run["nodes"]) == {f"{outer}:{lora}", f"{outer}:{cache}"}
    editor.page.evaluate("(id) => app.canvas.setGraph(app.graph.getNodeById(id).subgraph)", outer)
    editor.look_at(lora)
    editor.wait_for_panel(f"{outer}:{lora}", "256 tokens, joint")
    editor.wait_for_panel(f"{outer}:{cache}", "computed 2 times")
    editor.screenshot("subgraph")
    editor.page.evaluate("() => app.canvas.setGraph(app.graph)")
    saved = editor.serialized()["definitions"]["subgraphs"][0]["nodes"]
    assert all(node["properties"]["omini2"]["figures"] for node in saved)


@either_way
def test_figures_go_to_the_workflow_that_was_run(editor: Editor) -> None:
    """Another one with the same node ids may be open by then."""
    graph = template(TRY_IT)
    (lora,) = of_type(graph, "Omini2ApplyLoRA")
    editor.load(graph, "first")
    editor.page.evaluate(  # newer editors come back before they have sent it
        """() => new Promise((sent) => {
          window.omini2Seen.length = 0;
          const send = app.api.queuePrompt;
          app.api.queuePrompt = async function (...given) {
            app.api.queuePrompt = send;
            const answer = await send.apply(this, given);
            sent();
            return answer;
          };
          app.queuePrompt(0);
        })"""
    )
    editor.load(TEMPLATES[TRY_IT], "second")
    editor.page.wait_for_function(
        "() => window.omini2Seen.some(({ kind }) => kind === 'execution_success')", timeout=60_000
    )
    editor.page.wait_for_timeout(500)
    assert editor.node(lora, "node.properties.omini2 ?? null") is None
    states = """() => app.extensionManager.workflow.openWorkflows
        .find((w) => w.path.includes("first")).changeTracker.activeState"""
    first = editor.page.evaluate(states)
    (node,) = [n for n in first["nodes"] if n["id"] == lora]
    assert node["properties"]["omini2"]["figures"]["tokens"] == 256


# --- presets -----------------------------------------------------------------------------------

PRESET = {
    "known": True,
    "title": "Subject <b>512</b>",
    "note": "Image Guidance 1.5 on dev.",
    "values": {"attention": "joint", "placement": "right", "delta_rows": None, "size": 512},
}
STYLE = {
    "known": True,
    "title": "Style",
    "note": "",
    "values": {"attention": None, "placement": "left", "delta_rows": None},
}


@pytest.fixture
def presets(editor: Editor) -> Iterator[list[str]]:
    """A server that knows two LoRAs; the names that it was asked for."""
    asked: list[str] = []

    def answer(route: Any) -> None:
        asked.append(route.request.url.rpartition("lora=")[2])
        route.fulfill(json=STYLE if "style" in asked[-1] else PRESET)

    editor.page.route("**/omini2/preset?*", answer)
    yield asked
    editor.page.unroute("**/omini2/preset?*")


def test_choosing_a_lora_fills_in_its_preset(editor: Editor, presets: list[str]) -> None:
    graph = template(TRY_IT)
    (lora,), (encode,) = of_type(graph, "Omini2ApplyLoRA"), of_type(graph, "Omini2ConditionEncode")
    editor.load(graph, "presets")
    editor.look_at(lora)
    assert presets == []  # opening a file asks for nothing and changes nothing
    editor.set_widget(lora, "lora_name", "subject one.safetensors")
    editor.wait_for_panel(lora, "Subject <b>512</b>\nImage Guidance 1.5 on dev.")
    assert presets == ["subject%20one.safetensors"]
    assert editor.widget(lora, "attention") == "joint"
    assert editor.widget(encode, "placement") == "right"
    editor.screenshot("preset")
    editor.set_widget(lora, "lora_name", "style.safetensors")
    editor.wait_for_panel(lora, "Style")
    assert editor.widget(lora, "attention") == "auto"  # nothing of the last preset is left
    assert editor.widget(encode, "placement") == "left"
    opened = editor.serialized()
    editor.load(opened, "again")
    assert len(presets) == 2 and meaning(editor.serialized()) == meaning(opened)


def test_no_lora_is_photodoodles_choice(editor: Editor) -> None:
    """As the server itself answers."""
    graph = template(TRY_IT)
    (lora,), (encode,) = of_type(graph, "Omini2ApplyLoRA"), of_type(graph, "Omini2ConditionEncode")
    editor.load(graph, "without a LoRA")
    editor.look_at(lora)
    editor.set_widget(lora, "lora_name", "(none)")
    editor.wait_for_panel(lora, "PhotoDoodle: a picture to doodle on")
    assert editor.widget(lora, "family") == "PhotoDoodle"
    assert editor.widget(lora, "attention") == "joint"
    assert editor.widget(encode, "placement") == "aligned"


@either_way
@pytest.mark.parametrize(("compression", "scale", "size"), [(None, 1, 64), (0.25, 0.25, 256)])
def test_a_preset_is_for_the_graph_that_there_is(
    editor: Editor, compression: float | None, scale: float, size: int
) -> None:
    """The demo's subject LoRA, trained with 64x64 beside 256x256, as the server itself answers."""
    graph = template(TRY_IT)
    (lora,), (encode,) = of_type(graph, "Omini2ApplyLoRA"), of_type(graph, "Omini2ConditionEncode")
    editor.load(graph, f"subject {compression}")
    editor.look_at(lora)
    if compression is not None:
        between = """((compact) => {
          app.graph.add(compact);
          compact.widgets.find((w) => w.name === "compression").value = %s;
          app.graph.getNodeById(%d).connect(0, compact, 0);
          return compact.connect(0, node, node.inputs.findIndex((i) => i.name === "condition"));
        })(LiteGraph.createNode("Omini2CompactTokens")) && 1"""
        editor.node(lora, between % (compression, encode))
    editor.set_widget(lora, "lora_name", "omini2_demo_subject.safetensors")
    editor.wait_for_panel(lora, "omini2_demo_subject")
    assert editor.widget(encode, "placement") == "left"
    assert editor.widget(encode, "position_scale") == scale
    assert editor.widget(encode, "size") == size
    editor.run()
    editor.page.wait_for_timeout(300)
    assert editor.page.get_by_test_id("omini2_notice").count() == 0
    editor.screenshot(f"preset-subject-{compression}")


def test_what_the_person_has_set_stays(editor: Editor, presets: list[str]) -> None:
    graph = template(TRY_IT)
    (lora,), (encode,) = of_type(graph, "Omini2ApplyLoRA"), of_type(graph, "Omini2ConditionEncode")
    editor.load(graph, "kept")
    editor.look_at(lora)
    editor.set_widget(encode, "placement", "below")
    editor.set_widget(lora, "lora_name", "subject.safetensors")
    editor.wait_for_panel(lora, "Subject")
    assert editor.widget(encode, "placement") == "below"
    assert editor.widget(lora, "attention") == "joint"


# --- words -------------------------------------------------------------------------------------


@either_way
def test_a_warning_is_shown(editor: Editor) -> None:
    graph = template(TRY_IT)
    (scale,) = of_type(graph, "ImageScale")
    editor.load(graph, "warning")
    editor.set_widget(scale, "width", 250)
    editor.run()
    (encode,) = of_type(graph, "Omini2ConditionEncode")
    assert sum("250x256 was cropped" in said for said in editor.notices(encode)) == 1
    editor.screenshot("warning")


def test_foreign_text_stays_text(editor: Editor) -> None:
    bad = '<img src="x" onerror="window.omini2Bad = 1"><script>window.omini2Bad = 1</script>'
    graph = template(TRY_IT)
    (lora,) = of_type(graph, "Omini2ApplyLoRA")
    for node in graph["nodes"]:
        if node["id"] == lora:  # a workflow's file may come from anybody
            figures = {"kind": "condition", "active": True, "attention": bad}
            figures |= {"tokens": bad, "of": 9, "picture": [4, bad], "box": bad, "kept": [bad]}
            node["properties"]["omini2"] = {"note": bad, "figures": figures}
    editor.load(graph, "foreign")
    editor.look_at(lora)
    editor.page.evaluate(
        "(message) => app.api.dispatchCustomEvent('omini2.warning', { message })", bad
    )
    editor.page.locator(".p-toast-detail", has_text="onerror").wait_for()
    assert bad in editor.panel(lora) and "NaN" not in editor.panel(lora)
    assert editor.page.evaluate("() => window.omini2Bad ?? null") is None


def test_a_hostile_file_stays_text(editor: Editor, loras: Path) -> None:
    """Its name and metadata, through the real server: the note, the warning, the panel."""
    bad = "<img src=x onerror=omini2Bad=1>"
    name = f"{bad}{editor.renderer}.safetensors"
    said = {
        "independent_condition": "true", "position_delta": "0,-3", "position_scale": "1",
        "condition_size": "96x64", "target_size": "512x512", "base_model": bad,
        "condition_type": f"{bad}<script>omini2Bad=1</script>", "integration": bad,
    }  # fmt: skip
    tensors = load_file(ROOT / "demo_model" / "loras" / demo.DEMO_LORA)
    save_file(tensors, loras / name, {f"omini2.{key}": value for key, value in said.items()})
    graph = template(TRY_IT)
    (lora,) = of_type(graph, "Omini2ApplyLoRA")
    editor.load(graph, "hostile")
    editor.look_at(lora)
    editor.set_widget(lora, "lora_name", name)
    editor.wait_for_panel(lora, f"{name} says how it was trained")
    editor.run()
    assert any(f"{bad}{editor.renderer}" in said for said in editor.notices(lora))
    editor.wait_for_panel(lora, "256 tokens")
    editor.screenshot("hostile")
    assert editor.page.evaluate("() => window.omini2Bad ?? null") is None
    assert editor.page.locator("img[onerror]").count() == 0


# --- finding one's way -------------------------------------------------------------------------


WORDS = {
    "Omini2 Condition Encode": ["omini", "canny", "depth", "edges", "pose", "reference"],
    "Apply Omini2 LoRA": ["subject", "style", "controlnet", "ipadapter", "control", "reference"],
    "Omini2 Reference": ["redux", "kontext"],
    "Condition Cache": ["speed", "cache"],
    "Compact Tokens": ["mask", "inpaint", "outpaint"],
}


@either_way
def test_library_finds_nodes_by_a_beginners_words(editor: Editor) -> None:
    editor.command("Workspace.ToggleSidebarTab.node-library")
    search = editor.page.locator(".side-bar-panel input").first
    found = editor.page.locator(".side-bar-panel [role=treeitem]")
    for node, words in WORDS.items():
        for word in words:
            search.fill("ksampleradvanced")  # lest an earlier search's find be taken for this one's
            found.filter(has_text="KSampler").first.wait_for()
            found.filter(has_text="Omini2").first.wait_for(state="detached")
            assert found.filter(has_text=node).count() == 0
            search.fill(word)
            found.filter(has_text=node).first.wait_for()
    editor.screenshot("search")
    editor.command("Workspace.ToggleSidebarTab.node-library")


def test_a_conditions_sockets_can_be_seen(editor: Editor) -> None:
    if editor.renderer == "classic":
        pytest.skip("drawn on the canvas, in the colour of the wires")
    editor.load(TEMPLATES[TRY_IT], "sockets")
    (encode,) = editor.of_type("Omini2ConditionEncode")
    dots = editor.page.locator(f"[data-node-id='{encode}'] .lg-slot--output .slot-dot")
    dot = dots.first  # the condition's, above the image's
    colour = dot.evaluate("(dot) => getComputedStyle(dot).backgroundColor")
    shades = [int(shade) for shade in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour).groups()]
    assert min(shades) > 100  # on a dark node


def test_size_is_there_where_it_means_something(editor: Editor) -> None:
    graph = copy.deepcopy(TEMPLATES[TRY_IT])
    (encode,) = of_type(graph, "Omini2ConditionEncode")
    editor.load(graph, "size")
    editor.look_at(encode)
    before = editor.serialized()

    def shown() -> bool:
        if editor.renderer == "classic":
            return not editor.node(encode, "node.widgets.find((w) => w.name === 'size').hidden")
        rows = editor.page.locator(f"[data-node-id='{encode}'] .lg-node-widget")
        return rows.filter(has_text=re.compile("^size")).count() > 0

    wait_until(editor, lambda: not shown())
    editor.set_widget(encode, "placement", "fit")
    editor.set_widget(encode, "resize", "stretch")
    wait_until(editor, shown)
    editor.screenshot("size-shown")
    editor.set_widget(encode, "placement", "aligned")
    editor.set_widget(encode, "resize", "off")
    wait_until(editor, lambda: not shown())
    editor.screenshot("size-hidden")
    values = [n["widgets_values"] for n in before["nodes"] if n["id"] == encode]
    assert values == [
        n["widgets_values"] for n in editor.serialized()["nodes"] if n["id"] == encode
    ]


@either_way
def test_titles_on_the_canvas_stay_short(editor: Editor) -> None:
    editor.load(TEMPLATES[TRY_IT], "titles")
    (encode,) = editor.of_type("Omini2ConditionEncode")
    assert editor.node(encode, "node.title") == "Omini2 Condition Encode"


@either_way
@pytest.mark.parametrize("kind", HELP)
def test_help_page_opens(editor: Editor, kind: str) -> None:
    text = (ROOT / "web" / "docs" / f"{kind}.md").read_text(encoding="utf-8")
    editor.load({**TEMPLATES[TRY_IT], "nodes": [], "links": [], "groups": []}, f"help-{kind}")
    node = editor.page.evaluate(
        """(kind) => {
          const node = LiteGraph.createNode(kind);
          app.graph.add(node);
          app.canvas.selectNode(node);
          return node.id;
        }""",
        kind,
    )
    editor.look_at(node)
    editor.page.get_by_test_id("info-button").click()
    page = editor.page.locator(".node-help-content")
    page.locator(".markdown-content").wait_for()
    assert plain(text.strip().splitlines()[0]) in plain(page.inner_text())
    assert page.locator("img").evaluate(LOADED) > 0
    editor.screenshot(f"help-{kind}")


@either_way
def test_template_browser_shows_every_template_with_its_picture(editor: Editor) -> None:
    editor.command("Comfy.BrowseTemplates")
    browser = editor.page.locator(
        "[role=dialog]", has=editor.page.locator("[data-testid^=template-workflow-]")
    )
    browser.get_by_text("ComfyUI-Omini2", exact=True).first.click()
    cards = editor.page.locator("[data-testid^=template-workflow-]")
    editor.page.locator(f"[data-testid='template-workflow-{TRY_IT}']").wait_for()
    shown = 0
    while cards.count() > shown:  # more come as one scrolls
        shown = cards.count()
        cards.last.scroll_into_view_if_needed()
        editor.page.wait_for_timeout(500)
    listed = [card.get_attribute("data-testid") for card in cards.all()]
    first = [TRY_IT, *sorted(set(DEMOS) - {TRY_IT})]  # those that need no download
    rest = sorted(set(TEMPLATES) - set(first))
    assert listed == [f"template-workflow-{name}" for name in (*first, *rest)]
    for name in (*first, *rest):  # one below the other
        card = f"[data-testid='template-workflow-{name}']"
        editor.page.locator(card).scroll_into_view_if_needed()
        editor.page.wait_for_function(
            "([card, side]) => document.querySelector(`${card} img`)?.naturalWidth === side",
            arg=[card, thumbnails.SIDE],
        )
    cards.first.scroll_into_view_if_needed()
    editor.screenshot("templates")
    editor.page.locator(f"[data-testid='template-workflow-{TRY_IT}']").click()
    cards.first.wait_for(state="detached")
    editor.page.wait_for_function("() => app.graph.nodes.some((n) => n.type === 'Omini2DemoModel')")


def plain(text: str) -> str:
    return " ".join(text.replace("#", "").replace("*", "").split())


def wait_until(editor: Editor, condition: Any) -> None:
    for _ in range(200):
        if condition():
            return
        editor.page.wait_for_timeout(50)
    raise AssertionError("it did not come to pass")


def meaning(graph: dict[str, Any]) -> dict[str, Any]:
    """What of a graph's file counts: Nodes 2.0 measures nodes anew whenever it draws them, and
    newer editors write that a node without widgets has none."""
    nodes = [
        {k: v for k, v in node.items() if k not in ("order", "size", "pos") and v not in ([], {})}
        for node in sorted(graph["nodes"], key=lambda node: node["id"])
    ]
    return {"nodes": nodes, "links": graph["links"]}

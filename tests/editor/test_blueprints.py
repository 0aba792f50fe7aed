"""The subgraph blueprints in the host's editor: one node from the library, and what is inside."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from in_editor import Editor, either_way
from PIL import Image

from dev.host.server import Server
from dev.paths import ROOT
from dev.workflows import make
from dev.workflows.blueprints import BLUEPRINTS, Blueprint
from dev.workflows.graph import Graph

pytestmark = pytest.mark.xdist_group("editor")

FILES = {path.stem: path for path in sorted((ROOT / "subgraphs").glob("*.json"))}
EMPTY = {
    "nodes": [], "links": [], "groups": [], "version": 0.4, "last_node_id": 0, "last_link_id": 0,
}  # fmt: skip
# What a person may set outside, another value for each.
CHANGED: dict[str, Any] = {
    "text": "a red ring", "condition_scale": 0.35, "seed": 77, "threshold": 0.45,
    "image_guidance_scale": 2.25, "lora_name": "one of mine.safetensors",
}  # fmt: skip
PROMPT = """() => app.graphToPrompt().then(({ output }) => JSON.parse(JSON.stringify(output)))"""
HOLE = 112, 128
PHOTOS = {"Subject": "scene-thing", "Depth": "scene-depth"}


@pytest.fixture
def editor(editor: Editor) -> Iterator[Editor]:
    """Older editors ask for a LoRA's preset from outside, too."""
    no_preset = {"known": False, "title": "", "values": {}, "note": ""}
    editor.page.route("**/omini2/preset?*", lambda route: route.fulfill(json=no_preset))
    yield editor
    editor.page.unroute("**/omini2/preset?*")


def test_files_are_what_the_builder_gives() -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in FILES.values()}
    assert written == make.make_subgraphs(), "run python -m dev.workflows.make"


@either_way
@pytest.mark.compatibility("Hosts", "Subgraph blueprints are in the node library", "works", "")
def test_the_node_library_adds_one_node(editor: Editor) -> None:
    editor.load(EMPTY, "library")
    editor.command("Workspace.ToggleSidebarTab.node-library")
    search = editor.page.locator(".side-bar-panel input").first
    found = editor.page.locator(".side-bar-panel [role=treeitem]")
    for name in FILES:
        search.fill(name.lower())
        found.filter(has_text=name).first.wait_for()
    editor.screenshot("blueprints")
    found.filter(has_text=name).last.click()
    editor.page.wait_for_timeout(300)
    if not editor.serialized()["nodes"]:  # newer editors let one choose where
        editor.page.mouse.move(1200, 600)
        editor.page.mouse.click(1200, 600)
    editor.page.wait_for_function("() => app.graph.nodes.length === 1")
    assert editor.node(editor.serialized()["nodes"][0]["id"], "node.title") == name
    editor.command("Workspace.ToggleSidebarTab.node-library")


@pytest.mark.parametrize("name", FILES)
def test_what_is_set_outside_goes_where_it_belongs(editor: Editor, name: str) -> None:
    graph = json.loads(FILES[name].read_text(encoding="utf-8"))
    editor.load(graph, name)
    editor.page.keyboard.press("Escape")  # older editors offer to fetch its files at once
    (outer,) = graph["nodes"]
    (inner,) = graph["definitions"]["subgraphs"]
    outside = {slot["name"] for slot in outer["inputs"] if "widget" in slot}
    assert {"text", "seed"} <= outside
    before = prompt_of(editor)
    assert len(before) == len(inner["nodes"])
    changes = {key: value for key, value in CHANGED.items() if key in outside}
    for key, value in changes.items():
        editor.set_widget(outer["id"], key, value)
    after = prompt_of(editor)
    differing = {
        (key, value)
        for node_id, node in after.items()
        for key, value in node["inputs"].items()
        if not isinstance(value, list) and value != before[node_id]["inputs"][key]
    }
    assert differing == set(changes.items())
    editor.screenshot(name)


def prompt_of(editor: Editor) -> dict[str, Any]:
    """What would be queued."""
    found: dict[str, Any] = editor.page.evaluate(PROMPT)
    return found


@either_way
@pytest.mark.parametrize("build", BLUEPRINTS, ids=lambda build: build.__name__)
def test_it_draws(editor: Editor, server: Server, build: Any) -> None:
    """With the demo model in FLUX.1's place."""
    blueprint: Blueprint = build(True)
    graph = blueprint.as_dict()
    for node in graph["definitions"]["subgraphs"][0]["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 4
    words = "a big red ring on the right and a small blue star on the left on a grey background"
    photo = next((PHOTOS[word] for word in PHOTOS if word in blueprint.name), "scene")
    graph = with_ends(graph, photo)
    editor.load(graph, blueprint.name)
    outer = next(n for n in graph["nodes"] if n.get("title") == blueprint.name)
    editor.set_widget(outer["id"], "text", words)
    saved = server.base / "output" / "omini2"
    known = set(saved.glob("*"))
    editor.run()
    (file,) = set(saved.glob("*")) - known
    with Image.open(file) as image:
        low, high = image.convert("L").getextrema()
        assert min(image.size) >= 256 and high - low > 10  # not an empty one
    editor.fit()
    editor.screenshot(f"{blueprint.name}.run")


def with_ends(graph: dict[str, Any], photo: str) -> dict[str, Any]:
    """A blueprint's one node between a picture and what saves the new one."""
    (node,) = graph["nodes"]
    around = Graph("ends")
    picture = around.add("Omini2DemoImage", photo)
    nothing = around.add("SolidMask", 0.0, 512, 512)
    hole = around.add("SolidMask", 1.0, *HOLE)
    mask = around.add("MaskComposite", 64, 128, "add", destination=nothing, source=hole)
    save = around.add("SaveImage", "omini2/blueprint", images=picture)
    for column, each in enumerate((picture, nothing, hole, mask, save)):
        around.stack(column, 700, "", each)
    ends = around.as_dict()
    node["id"] = graph["last_node_id"] = 100
    links = ends["links"]
    kinds = {"IMAGE": picture.id, "MASK": mask.id}
    for number, slot in enumerate(node["inputs"]):
        if slot["type"] in kinds:
            slot["link"] = len(links) + 1
            links.append([slot["link"], kinds[slot["type"]], 0, 100, number, slot["type"]])
    last = next(link for link in links if link[3] == save.id)
    last[1:3] = [100, 0]
    node["outputs"][0]["links"] = [last[0]]
    for each in ends["nodes"]:
        for output in each["outputs"]:
            output["links"] = [k[0] for k in links if k[1] == each["id"]]
    return {**graph, "nodes": [*ends["nodes"], node], "links": links, "last_link_id": len(links)}

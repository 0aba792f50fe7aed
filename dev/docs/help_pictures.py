"""Makes web/docs/images/*.webp for the nodes' help pages: `python -m dev.docs.help_pictures`.

Each is the node in the real editor after a real run, wired to its neighbours, whose edges show at
the sides. Needs a Chromium and what the trainer needs. With nodes' ids behind it, only the runs
that those come from (Omini2LoadCache needs that of Omini2SaveCache).
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from dev.demo_model.scenes import draw, random_scene
from dev.host import browser
from dev.host.editor import ARGUMENTS, SIZE, Editor
from dev.host.server import Server
from dev.paths import ROOT
from dev.workflows.demo import WORKFLOWS
from dev.workflows.graph import TITLE, Graph
from dev.workflows.parts import (
    apply_lora,
    cache,
    condition,
    demo_lora,
    demo_model,
    prompt,
    sample_latent,
    square,
)

FOLDER = ROOT / "web" / "docs" / "images"
TRY_IT, PRUNED = "try-it-without-a-checkpoint", "edges-pruned-demo-model"
TRAINING, CACHES = "shapes", Path("output") / "omini2_caches"
STEPS, SIDE = 12, 256
RUN_LIMIT = 900_000  # ms
GAP, STUB, ROOM = 48, 32, 20  # pixels: to the neighbours, of them, above and below
BARS = 90  # pixels: of the editor's own above and below the graph
SHARPNESS = 1.5  # the help panel is narrow, screens are fine
QUALITY = 80

GraphFile = dict[str, Any]


# --- what is run -------------------------------------------------------------------------------


def template(name: str) -> GraphFile:
    """One of the example workflows."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def saving() -> GraphFile:
    """An independent condition with image guidance: a picture, and its K/V as a file."""
    graph = Graph("help-saving")
    models = demo_model(graph)
    photo = square(graph, graph.add("Omini2DemoImage", "scene-thing"), SIDE)
    encode = condition(graph, photo, models.vae, "right")
    lora = apply_lora(graph, models.model, encode, demo_lora("edges"))
    lora.values[3] = "independent"
    guided = graph.add("Omini2ImageGuidance", 1.5, model=lora)
    words = "this thing on the left and a yellow circle on the right on a green background"
    text = prompt(graph, models.clip, words, 3.5)
    latent = graph.add("EmptySD3LatentImage", SIDE, SIDE, 1)
    values = ("striped_cross", "The striped cross, to the right of the picture")
    saved = {"model": lora, "positive": text[1], "latent_image": latent}
    graph.add("Omini2SaveCache", *values, **saved)
    sampling = sample_latent(graph, guided, text, models.vae, latent, STEPS)
    graph.add("PreviewImage", images=sampling[-1])
    return graph.as_dict()


def loading(base: Path) -> GraphFile:
    """A picture with what `saving` has written."""
    graph = Graph("help-loading")
    models = demo_model(graph)
    [file] = (base / CACHES).glob("striped_cross*.safetensors")
    loaded = graph.add("Omini2LoadCache", file.name, 1.0, 0.0, 1.0, model=models.model)
    text = prompt(graph, models.clip, "a yellow circle on a green background", 3.5)
    latent = graph.add("EmptySD3LatentImage", SIDE, SIDE, 1)
    sampling = sample_latent(graph, loaded, text, models.vae, latent, STEPS)
    graph.add("PreviewImage", images=sampling[-1])
    return graph.as_dict()


def editing() -> GraphFile:
    """A part of a picture painted anew, and the proof that the rest is as it was."""
    graph = Graph("help-editing")
    models = demo_model(graph)
    photo = square(graph, graph.add("Omini2DemoImage", "scene"), SIDE)
    latent = graph.add("VAEEncode", pixels=photo, vae=models.vae)
    text = prompt(graph, models.clip, "a big yellow star on a blue background", 3.5)
    reference = graph.add("ReferenceLatent", conditioning=text[1], latent=latent)
    nothing = graph.add("SolidMask", 0.0, SIDE, SIDE)
    hole = graph.add("SolidMask", 1.0, 96, 112)
    mask = graph.add("MaskComposite", 64, 112, "add", destination=nothing, source=hole)
    values = ("mask", 0.2, 4, "auto", "off", 0)
    spot = graph.add("Omini2SpotEdit", *values, model=models.model, mask=mask)
    sampling = sample_latent(graph, spot, [reference, text[2]], models.vae, latent, STEPS)
    links = {"image": sampling[-1], "samples": sampling[1], "reference": photo}
    kept = graph.add("Omini2KeepUnchanged", 8, **links, vae=models.vae)
    graph.add("PreviewImage", images=kept)
    graph.add("PreviewAny", source=kept["report"])
    return graph.as_dict()


def referring() -> GraphFile:
    """A reference at half the side; the demo model takes one, though it wasn't trained on it."""
    graph = Graph("help-referring")
    models = demo_model(graph)
    photo = square(graph, graph.add("Omini2DemoImage", "scene-thing"), SIDE)
    words = "a yellow circle on a green background"
    text = prompt(graph, models.clip, words, 3.5)
    latent = graph.add("EmptySD3LatentImage", SIDE, SIDE, 1)
    settings = (0.5, True, 1.0, 0.0, 1.0, "picture")
    links = {"positive": text[1], "negative": text[2], "latent": latent}
    reference = graph.add(
        "Omini2Reference", *settings, model=models.model, vae=models.vae, image=photo, **links
    )
    kept = cache(graph, reference["model"])
    prompts = [reference["positive"], reference["negative"]]
    sampling = sample_latent(graph, kept, prompts, models.vae, latent, STEPS)
    graph.add("PreviewImage", images=sampling[-1])
    return graph.as_dict()


def training() -> GraphFile:
    """A short training of a LoRA that looks at a blurred picture."""
    graph = Graph("help-training")
    models = demo_model(graph)
    values = (
        *("the demo model", TRAINING, "blur", "none", "independent", 64, 1.0, 0, 0, 60, 4, 4),
        *("adamw", 0.003, "none", 250, 0, "fixed", "my_blur", False, 30, "off"),
    )
    node = graph.add("Omini2TrainLoRA", *values, clip=models.clip, vae=models.vae)
    graph.add("PreviewImage", images=node["loss_curve"])
    return graph.as_dict()


def prepare_training(base: Path) -> None:
    """Drawn scenes with captions in the host's input folder."""
    folder = base / "input" / TRAINING
    folder.mkdir(parents=True)
    for i in range(24):
        scene = random_scene(Random(i))
        pixels = (draw(scene, 64).picture * 255).round().astype("uint8")
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(scene.caption + "\n", encoding="utf-8")


# --- the picture -------------------------------------------------------------------------------


def neighbourhood(graph: GraphFile, node_id: int) -> GraphFile:
    """A node with those that it is wired to: sources to its left, what it goes into to its right.

    Args:
        graph: as the editor saves it.
    """
    graph = copy.deepcopy(graph)
    sources = {link[1] for link in graph["links"] if link[3] == node_id}
    targets = {link[3] for link in graph["links"] if link[1] == node_id}
    kept = {node_id, *sources, *targets}
    graph["links"] = [link for link in graph["links"] if node_id in (link[1], link[3])]
    graph["nodes"] = [node for node in graph["nodes"] if node["id"] in kept]
    graph["groups"] = []
    links = {link[0] for link in graph["links"]}
    [middle] = (node for node in graph["nodes"] if node["id"] == node_id)
    bottoms = {"left": 0, "right": 0}
    for node in graph["nodes"]:
        for slot in node.get("inputs", []):
            slot["link"] = slot.get("link") if slot.get("link") in links else None
        for slot in node.get("outputs", []):
            slot["links"] = [link for link in slot.get("links") or [] if link in links]
        if node is middle:
            node["pos"] = [0, 0]
            continue
        side = "left" if node["id"] in sources else "right"
        x = -GAP - node["size"][0] if side == "left" else middle["size"][0] + GAP
        node["pos"] = [x, bottoms[side]]
        bottoms[side] += node["size"][1] + TITLE + 20
    return graph


# What a run has put out, shown again on nodes that were loaded anew.
SHOW_OUTPUTS = """(outputs) => {
  for (const [node, output] of Object.entries(outputs)) {
    if (app.graph.getNodeById(node)) {
      app.api.dispatchCustomEvent("executed", { node, display_node: node, output });
    }
  }
}"""
# Puts a node in the middle, smaller if need be; returns what of the screen to take.
SHOW_NODE = f"""([id, width, height]) => {{
  const ds = app.canvas.ds;
  const [x, y, w, h] = app.graph.getNodeById(id).boundingRect;
  ds.scale = Math.min(1, (height - {2 * BARS}) / h);
  ds.offset[0] = width / 2 / ds.scale - w / 2 - x;
  ds.offset[1] = height / 2 / ds.scale - h / 2 - y;
  app.canvas.setDirty(true, true);
  const [wide, high] = [w / 2 + {GAP + STUB}, h / 2 + {ROOM}].map((side) => side * ds.scale);
  return {{ x: width / 2 - wide, y: height / 2 - high, width: 2 * wide, height: 2 * high }};
}}"""


def photograph(
    editor: Editor, graph: GraphFile, outputs: dict[str, Any], node_id: int
) -> Image.Image:
    """The node with its neighbours' edges."""
    editor.load(neighbourhood(graph, node_id), "help")
    editor.page.evaluate(SHOW_OUTPUTS, outputs)
    for _ in range(2):  # the node grows once it is seen
        editor.page.wait_for_timeout(800)
        clip = editor.page.evaluate(SHOW_NODE, [node_id, SIZE["width"], SIZE["height"]])
    editor.page.wait_for_timeout(400)
    return Image.open(BytesIO(editor.page.screenshot(clip=clip))).convert("RGB")


# The runs in the order that they need, and the nodes whose pictures they give.
RUNS: list[tuple[Callable[[Path], GraphFile], list[str]]] = [
    (
        lambda base: template(TRY_IT),
        [
            "Omini2DemoModel",
            "Omini2DemoImage",
            "Omini2ConditionEncode",
            "Omini2ApplyLoRA",
            "Omini2ConditionCache",
        ],
    ),
    (lambda base: template(PRUNED), ["Omini2CompactTokens"]),
    (lambda base: saving(), ["Omini2ImageGuidance", "Omini2SaveCache"]),
    (loading, ["Omini2LoadCache"]),
    (lambda base: editing(), ["Omini2SpotEdit", "Omini2KeepUnchanged"]),
    (lambda base: referring(), ["Omini2Reference"]),
    (lambda base: training(), ["Omini2TrainLoRA"]),
]


def make(editor: Editor, base: Path, only: list[str]) -> None:
    """Writes all pictures, or those of these nodes."""
    FOLDER.mkdir(exist_ok=True)
    for build, kinds in RUNS:
        if only and not set(only) & set(kinds):
            continue
        editor.open()  # the server may have new files to offer
        editor.load(build(base), "run")
        editor.run(RUN_LIMIT)
        editor.page.wait_for_timeout(1000)  # until the nodes have what the run said
        graph = editor.serialized()
        outputs = editor.page.evaluate("() => JSON.parse(JSON.stringify(app.nodeOutputs))")
        for kind in kinds:
            [node_id] = (node["id"] for node in graph["nodes"] if node["type"] == kind)
            image = photograph(editor, graph, outputs, node_id)
            image.save(FOLDER / f"{kind}.webp", quality=QUALITY, method=6)
            print(f"help pictures: {kind} {image.size}", flush=True)


def main() -> int:
    only = sys.argv[1:]
    program = browser.find()
    if program is None:
        print(
            "help pictures: there is no Chromium; run python -m dev.host.browser", file=sys.stderr
        )
        return 1
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        prepare_training(base)
        with Server(base, base / "server.log") as server, sync_playwright() as running:
            opened = running.chromium.launch(executable_path=program, args=ARGUMENTS)
            make(Editor(opened, server, "nodes2", base, SHARPNESS), base, only)
            opened.close()
    total = sum(path.stat().st_size for path in FOLDER.glob("*.webp"))
    print(f"help pictures: {total / 1e3:.0f} kB in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

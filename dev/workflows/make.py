"""Makes example_workflows/*.json and subgraphs/*.json: `python -m dev.workflows.make`.

One function a workflow, put together from the parts in `dev.workflows.parts`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dev.paths import ROOT
from dev.workflows.blueprints import BLUEPRINTS
from dev.workflows.caches import CACHES
from dev.workflows.compact import COMPACT
from dev.workflows.compared import compared
from dev.workflows.demo_edits import EDITS
from dev.workflows.easycontrol import EASYCONTROL
from dev.workflows.editing import EDITING
from dev.workflows.families import FAMILIES
from dev.workflows.graph import Graph, as_json
from dev.workflows.parts import (
    PHOTO_EDGES,
    SCENE_EDGES,
    apply_lora,
    base,
    cache,
    cached,
    condition,
    demo_lora,
    demo_model,
    edge_condition,
    encoded_image,
    finished,
    flux_dev,
    flux_note,
    note,
    place,
    sample,
    short_prompt,
    square,
    users_photo,
)
from dev.workflows.references import REFERENCES
from dev.workflows.restoring import RESTORING
from dev.workflows.subject import SUBJECTS
from dev.workflows.training import TRAINING

FOLDER, SUBGRAPHS = ROOT / "example_workflows", ROOT / "subgraphs"
DEMO_WORDS = "a big orange star and a big cyan ring on a white background"
SHORT = """
### Nodes that are not there

FLUX.1-dev's guidance is 3.5 where no node says otherwise: *FluxGuidance* behind the prompt sets \
another. KSampler's *negative* isn't looked at while *cfg* is 1, so it has the prompt as well.
"""


def try_it() -> Graph:
    """Edges with the demo model: runs anywhere right after it is opened."""
    graph = Graph("try-it-without-a-checkpoint")
    notes = note(
        graph,
        "Read me",
        """
### Nothing to download

Press **Run**. Model, LoRA and picture come with the extension, and any CPU is through in \
seconds. The small model knows a world of drawn shapes: circle, square, triangle, star, ring and \
cross in eight colours, plain, striped or dotted, at 256x256. The edges of the picture say where \
things are, the prompt says what they are. It knows no photos, only the pictures called *scene*.

### Change first

- the shapes and colours in the prompt
- *condition_scale* in Apply Omini2 LoRA: 0 shuts the edges out, 2 presses them on
- *reuse* in Condition Cache: *off* computes the condition at every step, *once* \
only at the first; compare the times

### For real pictures

Open the template **edges**: the same graph with FLUX.1-dev.
""",
    )
    models = demo_model(graph)
    shipped = graph.add("Omini2DemoImage", "scene")
    photo = [shipped, square(graph, shipped, 256)]
    steps = edge_condition(graph, photo[-1], models.vae, SCENE_EDGES)
    omini2 = cached(graph, models.model, steps[1], demo_lora("edges"))
    return finished(graph, notes, models, [(photo, steps)], omini2, DEMO_WORDS, 256, 12)


def edge_guided() -> Graph:
    """FLUX.1-dev follows the edges of a photo."""
    graph = Graph("edges")
    change = """
- the picture in *Load Image* (any size)
- the prompt: say what the picture shows
- Canny's thresholds, until the edges are those that matter
- *refresh_every* in Condition Cache: lower is closer to no cache, higher is faster
"""
    notes = flux_note(graph, change, SHORT)
    models = flux_dev(graph)
    load = users_photo(graph, "Your picture")
    photo = [load, square(graph, load, 512)]
    steps = edge_condition(graph, photo[-1], models.vae)
    omini2 = cached(graph, models.model, steps[1], "canny.safetensors")
    words = "a blue porcelain cup of hot chocolate on a white marble table, soft morning light"
    text = short_prompt(graph, models.clip, words)
    sampling = sample(graph, omini2[-1], text, models.vae, 512, 28)
    place(graph, notes, models, [(photo, steps)], omini2, text, sampling)
    return graph


def depth() -> Graph:
    """FLUX.1-dev fills the room that a depth map shows."""
    graph = Graph("depth")
    change = """
- the picture: a depth map, near is white; a depth extension makes one of your photo, and then \
*Load Image* takes the place of *Omini2 Demo Image*
- the prompt: say what is where; the depth map leaves colours and materials to the words
- *condition_scale* in Apply Omini2 LoRA: lower it where the depth has too much of a say
"""
    notes = flux_note(graph, change)
    models = flux_dev(graph)
    shipped = graph.add("Omini2DemoImage", "room-depth", title="Depth map")
    encode = condition(graph, shipped, models.vae, "aligned", "crop")
    omini2 = cached(graph, models.model, encode, "depth.safetensors")
    words = "three stone balls and a wooden crate in an empty hall, evening light"
    lane = [shipped], [encode, encoded_image(graph, encode)]
    return finished(graph, notes, models, [lane], omini2, words)


def two_conditions(demo: bool) -> Graph:
    """A thing from one picture goes into the outlines of another."""
    b = base("two-conditions", demo)
    graph = b.graph
    change = """
- both pictures: the first gives the outlines, the second the thing
- *condition_scale* of each *Apply Omini2 LoRA*: lower the one that has too much of a say
"""
    if not demo:
        change += "- *image_guidance_scale*: it strengthens both conditions\n"
    notes = b.note("two-conditions", change)
    if demo:
        outlines = b.photo("")
        thing = graph.add("Omini2DemoImage", "scene-thing", title="Your subject")
    else:
        outlines = b.photo("Picture for the outlines")
        thing = users_photo(graph, "Your subject")
    shape = edge_condition(graph, outlines[-1], b.models.vae, SCENE_EDGES if demo else PHOTO_EDGES)
    # Each where its LoRA was trained to look for it.
    place_of_it, size = ("left", 64) if demo else ("right", 512)
    look = condition(graph, thing, b.models.vae, place_of_it, "crop", size)
    first = apply_lora(graph, b.models.model, shape[1], b.lora("canny.safetensors", "edges"))
    second = apply_lora(graph, first, look, b.lora("subject_512.safetensors", "subject"))
    omini2 = [first, second]
    if not demo:
        omini2.append(graph.add("Omini2ImageGuidance", 1.5, model=second))
    omini2.append(cache(graph, omini2[-1]))
    words = "A porcelain cup painted with this item, on a wooden table."
    if demo:
        words = "this thing and a big cyan ring on a white background"
    lanes = [(outlines, shape), ([thing], [look])]
    return finished(graph, notes, b.models, lanes, omini2, words, b.side, b.steps)


WORKFLOWS: list[Callable[[], Graph]] = [
    try_it,
    edge_guided,
    depth,
    partial(two_conditions, False),
    partial(two_conditions, True),
    *SUBJECTS,
    *RESTORING,
    *COMPACT,
    compared,
    *CACHES,
    *EASYCONTROL,
    *REFERENCES,
    *EDITING,
    *EDITS,
    *FAMILIES,
    *TRAINING,
]


def make_all() -> dict[str, str]:
    """File name -> content, for every workflow."""
    graphs = [build() for build in WORKFLOWS]
    return {f"{graph.name}.json": as_json(graph.as_dict()) for graph in graphs}


def make_subgraphs() -> dict[str, str]:
    """The same for the blueprints."""
    made = [build(False) for build in BLUEPRINTS]
    return {f"{each.name}.json": as_json(each.as_dict()) for each in made}


def main() -> None:
    for folder, files in ((FOLDER, make_all()), (SUBGRAPHS, make_subgraphs())):
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

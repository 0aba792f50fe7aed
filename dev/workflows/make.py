"""Makes example_workflows/*.json: `python -m dev.workflows.make`.

One function a workflow, put together from the parts in `dev.workflows.parts`.
"""

from __future__ import annotations

from collections.abc import Callable

from dev.paths import ROOT
from dev.workflows.compact import COMPACT
from dev.workflows.compared import compared
from dev.workflows.easycontrol import EASYCONTROL
from dev.workflows.editing import EDITING
from dev.workflows.families import FAMILIES
from dev.workflows.graph import Graph
from dev.workflows.parts import (
    SCENE_EDGES,
    apply_lora,
    cache,
    cached,
    condition,
    demo_lora,
    demo_model,
    edge_condition,
    finished,
    flux_dev,
    flux_dev_note,
    note,
    square,
    users_photo,
)
from dev.workflows.references import REFERENCES
from dev.workflows.restoring import RESTORING
from dev.workflows.subject import SUBJECTS
from dev.workflows.training import TRAINING

FOLDER = ROOT / "example_workflows"
DEMO_WORDS = "a big orange star and a big cyan ring on a white background"


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
cross in eight colours, plain, striped or dotted. The edges of the picture say where things are, \
the prompt says what they are.

### Change first

- the shapes and colours in the prompt
- *condition_scale* in Apply Omini2 LoRA: 0 shuts the edges out, 2 presses them on
- *reuse* in Condition Cache: *off* computes the condition at every step, *once* \
only at the first; compare the times

### For real pictures

Open the template **edges**: the same graph with FLUX.1-dev.
""",
        370,
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
    notes = flux_dev_note(graph, {"canny.safetensors": "experimental"}, change)
    models = flux_dev(graph)
    photo = users_photo(graph, "Your picture")
    steps = edge_condition(graph, photo[-1], models.vae)
    omini2 = cached(graph, models.model, steps[1], "canny.safetensors")
    words = "a blue porcelain cup of hot chocolate on a white marble table, soft morning light"
    return finished(graph, notes, models, [(photo, steps)], omini2, words)


def depth() -> Graph:
    """FLUX.1-dev fills the room that a depth map shows."""
    graph = Graph("depth")
    change = """
- the picture: a depth map of 512x512, near is white; a depth extension makes one of your photo, \
and then *Load Image* takes the place of *Omini2 Demo Image*
- the prompt: say what is where; the depth map leaves colours and materials to the words
- *condition_scale* in Apply Omini2 LoRA: lower it where the depth has too much of a say
"""
    notes = flux_dev_note(graph, {"depth.safetensors": "experimental"}, change)
    models = flux_dev(graph)
    shipped = graph.add("Omini2DemoImage", "room-depth", title="Depth map")
    photo = [shipped, square(graph, shipped, 512)]
    encode = condition(graph, photo[-1], models.vae, "aligned")
    look = graph.add("PreviewImage", title="The condition", images=photo[-1])
    omini2 = cached(graph, models.model, encode, "depth.safetensors")
    words = "three stone balls and a wooden crate in an empty hall, evening light"
    return finished(graph, notes, models, [(photo, [encode, look])], omini2, words)


def two_conditions() -> Graph:
    """FLUX.1-dev puts a thing from one photo into the outlines of another."""
    graph = Graph("two-conditions")
    change = """
- both pictures: the first gives the outlines, the second the thing
- *condition_scale* of each *Apply Omini2 LoRA*: lower the one that has too much of a say
- *image_guidance_scale*: it strengthens both conditions
"""
    files = {"canny.safetensors": "experimental", "subject_512.safetensors": "omini"}
    notes = flux_dev_note(graph, files, change)
    models = flux_dev(graph)
    outlines = users_photo(graph, "Picture for the outlines")
    thing = users_photo(graph, "Your subject")
    shape = edge_condition(graph, outlines[-1], models.vae)
    look = condition(graph, thing[-1], models.vae, "right")
    first = apply_lora(graph, models.model, shape[1], "canny.safetensors")
    second = apply_lora(graph, first, look, "subject_512.safetensors")
    guided = graph.add("Omini2ImageGuidance", 1.5, model=second)
    omini2 = [first, second, guided, cache(graph, guided)]
    words = "A porcelain cup painted with this item, on a wooden table."
    lanes = [(outlines, shape), (thing, [look])]
    return finished(graph, notes, models, lanes, omini2, words)


WORKFLOWS: list[Callable[[], Graph]] = [
    try_it,
    edge_guided,
    depth,
    two_conditions,
    *SUBJECTS,
    *RESTORING,
    *COMPACT,
    compared,
    *EASYCONTROL,
    *REFERENCES,
    *EDITING,
    *FAMILIES,
    *TRAINING,
]


def make_all() -> dict[str, str]:
    """File name -> content, for every workflow."""
    graphs = [build() for build in WORKFLOWS]
    return {f"{graph.name}.json": graph.as_json() for graph in graphs}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, content in make_all().items():
        (FOLDER / name).write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

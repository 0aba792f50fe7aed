"""Example workflows for a condition as a file: one writes it, one draws with it."""

from __future__ import annotations

from collections.abc import Callable

from dev.workflows.graph import Graph
from dev.workflows.parts import (
    GUIDANCE,
    SCENE_EDGES,
    apply_lora,
    cache,
    demo_lora,
    demo_model,
    edge_condition,
    note,
    place,
    prompt,
    sample,
    square,
)

SIDE, STEPS = 256, 12
SAVED = "scene_edges"  # what the file's name starts with
WORDS = "a big orange star and a big cyan ring on a white background"
OTHER_WORDS = "a big green star and a big pink ring on a black background"
SAVING = """
### Nothing to download

Press **Run**: *Omini2 Save Cache* writes what the edges have become inside of the model, their \
keys and values, to *output/omini2_caches*, and the picture shows what they do. Then open the \
template **use-saved-cache-demo-model**: it draws with that file, and needs neither this picture \
nor its LoRA.

### Change first

- the picture: another one makes another file; *filename_prefix* is the start of its name
- *description*: what others should know of it; it is kept in the file

### Good to know

One condition a file, and only one that is independent of text and picture: its keys and values \
are the same at every step. Of the published LoRAs those of EasyControl and OmniConsistency are; \
the file belongs to the model that it was written with.
"""
LOADING = f"""
### First

Run the template **save-cache-demo-model** once: it writes the file that *Omini2 Load Cache* \
names. If the editor was open then, press **R** to have it listed.

Then press **Run**: edges steer the picture, without the picture that they are from, without Canny \
and without a LoRA.

### Change first

- the prompt. The file knows where the shapes are, the words say what they are
- *condition_scale*: 0 shuts the edges out, 2 presses them on
- *cache_name*: another file, such as one that somebody sent you; they lie in \
*models/omini2_caches* or *output/omini2_caches*

The file is *{SAVED}_00001_.safetensors*, as the first run names it.
"""


def saving() -> Graph:
    """The demo model's edges go into a file, and into a picture."""
    graph = Graph("save-cache-demo-model")
    notes = note(graph, "Read me", SAVING)
    models = demo_model(graph)
    shipped = graph.add("Omini2DemoImage", "scene")
    photo = [shipped, square(graph, shipped, SIDE)]
    steps = edge_condition(graph, photo[-1], models.vae, SCENE_EDGES)
    lora = apply_lora(graph, models.model, steps[1], demo_lora("edges"))
    text = prompt(graph, models.clip, WORDS, GUIDANCE)
    kept = cache(graph, lora)
    sampling = sample(graph, kept, text, models.vae, SIDE, STEPS)
    said = "A star on the left and a ring on the right, as edges"
    inputs = {"model": lora, "positive": text[1], "latent_image": sampling[0]}
    save = graph.add("Omini2SaveCache", SAVED, said, **inputs)
    place(graph, notes, models, [(photo, steps)], [lora, kept, save], text, sampling)
    return graph


def loading() -> Graph:
    """A picture with that file instead of a condition."""
    graph = Graph("use-saved-cache-demo-model")
    notes = note(graph, "Read me", LOADING)
    models = demo_model(graph)
    file = f"{SAVED}_00001_.safetensors"
    load = graph.add("Omini2LoadCache", file, 1.0, 0.0, 1.0, model=models.model)
    text = prompt(graph, models.clip, OTHER_WORDS, GUIDANCE)
    sampling = sample(graph, load, text, models.vae, SIDE, STEPS)
    place(graph, notes, models, [], [load], text, sampling)
    return graph


CACHES: list[Callable[[], Graph]] = [saving, loading]

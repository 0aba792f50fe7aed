"""A first training: twelve pictures become a LoRA, and the same graph draws with it."""

from __future__ import annotations

from dev.workflows.graph import Graph
from dev.workflows.parts import (
    MODELS,
    NOTES,
    OMINI2,
    PICTURES,
    RESULT,
    SAMPLING,
    SCENE_EDGES,
    WIDE,
    demo_model,
    edge_condition,
    note,
    prompt,
    sample,
    square,
)

WORDS = "a big orange star and a big cyan ring on a white background"
LORA = "my_first_edges"
STEPS = 300
NOTE = """
### Nothing to download

Press **Run** and wait some minutes. *Omini2 Train LoRA* trains a LoRA on twelve pictures that \
come with the extension, so that the demo model listens to edges; then the same words are drawn \
twice, without it and with it. The node shows how far it is, the time left and what the LoRA draws.

Training needs Python packages that ComfyUI doesn't have; the node says how to install them.

### Change first

- *steps*: raise them and press **Run** again, and training goes on from where it was
- the shapes and colours in the prompt: the edges say where things are, the words what they are
- *images*: a folder of your own in ComfyUI's input folder

### For real pictures

Put the stock loaders with FLUX.1-dev in the place of *Omini2 Demo Model*, choose it as *base* as \
well and a few hundred pictures with captions as *images*.
"""


def train_demo() -> Graph:
    """The demo model learns to follow edges."""
    graph = Graph("train-demo-model")
    notes = note(graph, "Read me", NOTE, 520)
    models = demo_model(graph)
    train = graph.add(
        "Omini2TrainLoRA",
        *("the demo model", "the demo pictures", "canny", "none", "independent", 0, 1.0, 0, 0),
        *(STEPS, 4, 6, "auto", 0.0, "none", 50, 0, "fixed", LORA, True, 50),
        clip=models.clip,
        vae=models.vae,
    )
    shipped = graph.add("Omini2DemoImage", "scene")
    photo = square(graph, shipped, 256)
    canny, encode, look = edge_condition(graph, photo, models.vae, SCENE_EDGES)
    values = ("(none)", 1.0, 1.0, "auto", 0.0, 1.0, "auto")
    links = {"model": models.model, "condition": encode, "lora_name": train["lora"]}
    apply = graph.add("Omini2ApplyLoRA", *values, **links)
    text = prompt(graph, models.clip, WORDS, 3.5)
    without = sample(graph, models.nodes[0], text, models.vae, 256, 12)
    empty, sampler, decoded = sample(graph, apply, text, models.vae, 256, 12)
    beside = graph.add("ImageStitch", "right", True, 0, "white", image1=without[-1], image2=decoded)
    save = graph.add("SaveImage", f"omini2/{graph.name}", title="Without, with", images=beside)
    graph.stack(NOTES, 0, "", notes)
    graph.stack(PICTURES, 0, "1  Training", *models.nodes, train)
    graph.stack(MODELS, 0, "2  Picture and its edges", shipped, photo, canny, encode, look)
    below = graph.stack(OMINI2, 0, "3  The trained LoRA", apply)
    graph.stack(OMINI2, below, "4  Prompt", *text)
    below = graph.stack(SAMPLING, 0, "5  Without the LoRA", *without)
    graph.stack(SAMPLING, below, "6  With it", empty, sampler, decoded)
    graph.stack(RESULT, 0, "7  Without, with", beside, save, width=WIDE)
    return graph


TRAINING = [train_demo]

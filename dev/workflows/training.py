"""A first training: twelve pictures become a LoRA, and the same graph draws with it."""

from __future__ import annotations

from dev.workflows.graph import Graph
from dev.workflows.parts import (
    CONDITIONS,
    NOTES,
    OMINI2,
    PICTURES,
    RESULT,
    SAMPLING,
    WIDE,
    condition,
    demo_model,
    note,
    prompt,
    sample,
    square,
)

WORDS = "a big yellow star and a big pink ring on a blue background"
NOTE = """
### Nothing to download

Press **Run** and wait some minutes. *Omini2 Train LoRA* trains a LoRA on twelve pictures that \
come with the extension, so that the demo model learns to look at a blurred picture. Then the same \
words are drawn twice, without the LoRA and with it: with it, things are where the blurred picture \
has them. The node shows how far it is, the time left, and what the LoRA draws.

Training needs Python packages that ComfyUI doesn't have; the node says how to install them.

### Change first

- *steps*: raise them and press **Run** again, and training goes on from where it was; **Cancel** \
and **Run** go on, too
- the shapes and colours in the prompt
- *images*: a folder of your own in ComfyUI's input folder, and another *lora_name*

### For real pictures

Put the stock loaders with FLUX.1-dev in the place of *Omini2 Demo Model*, choose it as *base* as \
well, and a few hundred pictures with captions as *images*. *more options* has the rest.
"""


def train_demo() -> Graph:
    """The demo model learns to look at a blurred picture."""
    graph = Graph("train-demo-model")
    notes = note(graph, "Read me", NOTE)
    models = demo_model(graph)
    train = graph.add(
        "Omini2TrainLoRA",
        *("the demo model", "the demo pictures", "blur", "none", "independent", 0, 1.0, 0, 0),
        *(150, 4, 4, "adamw", 0.003, "none", 50, 0, "fixed", "my_first_lora", True, 50, "off"),
        clip=models.clip,
        vae=models.vae,
    )
    shipped = graph.add("Omini2DemoImage", "scene")
    photo = square(graph, shipped, 256)
    blurred = graph.add("ImageBlur", 15, 5.0, title="Blur", image=photo)
    encode = condition(graph, blurred, models.vae, "aligned")
    look = graph.add("PreviewImage", title="The condition", images=blurred)
    values = ("(none)", 1.0, 1.0, "auto", 0.0, 1.0, "auto")
    links = {"model": models.model, "condition": encode, "lora_name": train["lora"]}
    apply = graph.add("Omini2ApplyLoRA", *values, **links)
    text = prompt(graph, models.clip, WORDS, 3.5)
    without = sample(graph, models.nodes[0], text, models.vae, 256, 12)
    drawn = sample(graph, apply, text, models.vae, 256, 12)
    pictures = {"image1": without[-1], "image2": drawn[-1]}
    beside = graph.add("ImageStitch", "right", True, 8, "white", **pictures)
    save = graph.add("SaveImage", f"omini2/{graph.name}", title="Without, with", images=beside)
    graph.stack(NOTES, 0, "", notes)
    graph.stack(PICTURES, 0, "1  Training", *models.nodes, train)
    graph.stack(CONDITIONS, 0, "2  Picture to look at", shipped, photo, blurred, encode, look)
    below = graph.stack(OMINI2, 0, "3  The trained LoRA", apply)
    graph.stack(OMINI2, below, "4  Prompt", *text)
    below = graph.stack(SAMPLING, 0, "5  Without the LoRA", *without)
    graph.stack(SAMPLING, below, "6  With it", *drawn)
    graph.stack(RESULT, 0, "7  Without, with", beside, save, width=WIDE)
    return graph


TRAINING = [train_demo]

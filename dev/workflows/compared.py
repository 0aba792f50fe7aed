"""One example workflow that draws the same picture in four ways, from exact to cheap."""

from __future__ import annotations

from dev.workflows.graph import MESSAGES, Graph, Node
from dev.workflows.parts import (
    NOTES,
    SCENE_EDGES,
    WIDE,
    apply_lora,
    cache,
    compact,
    demo_lora,
    demo_model,
    edges,
    note,
    sample_latent,
    short_prompt,
    square,
)

GIVEN, LORAS, CACHES, SAMPLERS, PICTURES, RESULT = range(NOTES + 1, NOTES + 7)  # columns
ROWS = "A  Every step", "B  Once", "C  Every 5 steps", "D  Compact 0.5, every 5 steps"
SIDE, STEPS = 256, 12
WORDS = "a big orange star and a big cyan ring on a white background"
NOTE = """
### Nothing to download

Press **Run**: the same prompt, seed and edges give four pictures. Model, LoRA and picture come \
with the extension.

- **A** computes the condition at every step, as without a cache
- **B** computes it once, at the first step
- **C** computes it again every 5 steps
- **D** has a quarter of the tokens, and computes them every 5 steps

What each saved stands on its *Condition Cache* after the run: how often the condition was \
computed, the size of its keys and values, and the share of work saved. *Compact Tokens* shows \
what is left of the condition.

### Change first

- *refresh_every* in C: where does the picture start to differ from A?
- *compression* in D: 0.25 leaves a sixteenth
- *attention* in both Apply Omini2 LoRA: with *independent* A, B and C are the same picture, since \
such a condition is the same at every step

### With FLUX.1

Take *Condition Cache* or *Compact Tokens* over into any of the other templates: the settings are \
the same.
"""


def compared() -> Graph:
    """The demo model without a cache, with two kinds of reuse, and with fewer tokens.

    Laid out in rows, so that wires run beside nodes: what all samplers take stands to their left,
    and the VAE comes over their heads.
    """
    graph = Graph("reuse-and-compact-tokens-compared-demo-model", 0.65)
    notes = note(graph, "Read me", NOTE)
    models = demo_model(graph)
    shipped = graph.add("Omini2DemoImage", "scene")
    photo = square(graph, shipped, SIDE)
    canny, encode = edges(graph, photo, models.vae, SCENE_EDGES)
    lora = apply_lora(graph, models.model, encode, demo_lora("edges_joint"))
    once = reuse(graph, lora, "Condition Cache for B", "once")
    every = reuse(graph, lora, "Condition Cache for C", "every_n_steps")
    fewer = compact(graph, encode, compression=0.5)
    small = apply_lora(graph, models.model, fewer, demo_lora("edges_compact"))
    cheap = reuse(graph, small, "Condition Cache for D", "every_n_steps")
    text = short_prompt(graph, models.clip, WORDS)
    latent = graph.add("EmptySD3LatentImage", SIDE, SIDE, 1)
    vae = graph.add("Reroute", value=models.vae)

    graph.stack(NOTES, 0, "", notes)
    below = graph.stack(GIVEN, 0, "1  Model", *models.nodes)
    graph.stack(GIVEN, below, "2  Picture and condition", shipped, photo, canny, encode)
    below = graph.stack(LORAS, 0, "3  All tokens", lora)
    graph.stack(LORAS, below, "4  A quarter of the tokens", fewer, small)
    below = graph.stack(CACHES, 0, "5  Prompt and size", *text, latent)
    graph.stack(CACHES, below, "6  Condition Cache", once, every, cheap)

    below, pictures = 0, []
    graph.stack(PICTURES, -40, "", vae)
    for title, model in zip(ROWS, (lora, once, every, cheap), strict=True):
        _, sampler, decoded = sample_latent(graph, model, text, vae.socket, latent, STEPS)
        pictures.append(decoded)
        graph.stack(PICTURES, below + 80, "", decoded)
        below = graph.stack(SAMPLERS, below, title, sampler)
    upper = stitch(graph, "right", pictures[0], pictures[1])
    lower = stitch(graph, "right", pictures[2], pictures[3])
    whole = stitch(graph, "down", upper, lower)
    save = graph.add("SaveImage", f"omini2/{graph.name}", images=whole)
    below = graph.stack(RESULT, MESSAGES, "8  A B above C D", save, width=WIDE)
    graph.stack(RESULT, below, "7  One picture of four", upper, lower, whole, width=WIDE)
    return graph


def reuse(graph: Graph, model: Node, title: str, how: str) -> Node:
    """A condition cache that says in its title which picture it is for."""
    node = cache(graph, model)
    node.values[0], node.title = how, title
    return node


def stitch(graph: Graph, direction: str, first: Node, second: Node) -> Node:
    """The second picture beside or below the first."""
    values = (direction, True, 8, "white")
    return graph.add("ImageStitch", *values, image1=first, image2=second)

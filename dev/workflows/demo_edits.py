"""Example workflows that edit with the demo model: they run right after they are opened."""

from __future__ import annotations

from collections.abc import Callable

from dev.workflows.editing import Given, finished, spot_edit
from dev.workflows.graph import Graph, Node
from dev.workflows.parts import (
    GUIDANCE,
    Models,
    cache,
    demo_lora,
    demo_model,
    load_lora,
    no_negative,
    note,
    sample_latent,
    square,
)
from dev.workflows.references import laid_out

SIDE, STEPS = 256, 12
ONE, TWO = "edit_joint", "edit_two"
NOTE = """
### Nothing to download

Press **Run**: model, LoRA and pictures come with the extension. The small model knows a world of \
drawn shapes (circle, square, triangle, star, ring and cross), and this LoRA {edits}. It is a \
small model: not every edit is right.

### Change first

{change}

### For real pictures

Open the template **{name}**.
"""


FOUR = """four kinds of edits of it:

- *make the yellow star red*
- *remove the pink ring*
- *add a small red square on the left*
- *put everything on a green background*

Other words mean little to it"""


def edit_note(graph: Graph, name: str, change: str, edits: str = FOUR) -> Node:
    """What to know before the first run; the template of that name is for real pictures."""
    said = NOTE.format(change=change.strip(), name=name, edits=edits)
    return note(graph, "Read me", said)


def editor(graph: Graph, task: str) -> Models:
    """The demo model with a LoRA for edits, which Load LoRA puts on all of the model."""
    models = demo_model(graph)
    lora = load_lora(graph, models.model, demo_lora(task), 1.0)
    return Models(lora.socket, models.clip, models.vae, [*models.nodes, lora])


def scene(graph: Graph, photo: str, title: str) -> list[Node]:
    """A picture at the size that the model knows, the last node."""
    shipped = graph.add("Omini2DemoImage", photo, title=title)
    return [shipped, square(graph, shipped, SIDE)]


def encoded(graph: Graph, models: Models, photo: str, title: str) -> list[Node]:
    """A picture as a latent, the last node."""
    nodes = scene(graph, photo, title)
    return [*nodes, graph.add("VAEEncode", pixels=nodes[-1], vae=models.vae)]


def instructed(graph: Graph, models: Models, words: str, *latents: Node) -> list[Node]:
    """The prompt, which has the pictures as references; the last two go to the sampler."""
    prompt = [graph.add("CLIPTextEncode", words, title="Prompt", clip=models.clip)]
    for latent in latents:
        links = {"conditioning": prompt[-1], "latent": latent}
        prompt.append(graph.add("ReferenceLatent", **links))
    positive = graph.add("FluxGuidance", GUIDANCE, conditioning=prompt[-1])
    return [*prompt, positive, no_negative(graph, prompt[0])]


def cached_edit() -> Graph:
    """A picture is edited, and the reference is computed every few steps only."""
    graph = Graph("edit-demo-model")
    change = """
- the prompt
- *reuse* in Condition Cache: *off* computes the reference at every step, which takes nearly \
twice as long; *once* at the first step only
"""
    notes = edit_note(graph, "kontext-edit", change)
    models = editor(graph, ONE)
    photo = encoded(graph, models, "scene", "Picture to edit")
    prompt = instructed(graph, models, "put everything on a green background", photo[-1])
    kept = cache(graph, models.nodes[-1])
    sampling = sample_latent(graph, kept, prompt, models.vae, photo[-1], STEPS)[1:]
    return laid_out(graph, notes, [photo], models.nodes, kept, prompt, sampling)


def spot_edit_demo() -> Graph:
    """Only what changes is computed, and the rest keeps the picture's own pixels."""
    graph = Graph("spot-edit-demo-model")
    change = """
- the prompt
- *threshold* in Omini2 Spot Edit: with *select* cosine a lower one leaves more as it was. The \
node shows after the run what was computed. With FLUX.1 *select* perceptual chooses better; this \
model's VAE doesn't know it
- *Omini2 Keep Unchanged* gives what was left alone its own pixels, bit for bit, and says how far \
the rest has moved
"""
    notes = edit_note(graph, "spot-edit-kontext", change)
    models = editor(graph, ONE)
    photo = scene(graph, "scene", "Picture to edit")
    given = Given(photo[-1].socket, None, photo)
    latent = graph.add("VAEEncode", pixels=given.image, vae=models.vae)
    text = instructed(graph, models, "make the pink ring green", latent)
    # The demo model's VAE has no decoder that select perceptual can look into.
    spot = spot_edit(graph, models, "cosine", 0.95, None, grow=1)
    return finished(graph, notes, models, given, spot, latent, text, (STEPS, 1.0))


def two_references() -> Graph:
    """A thing of one picture goes into another."""
    graph = Graph("two-references-demo-model")
    change = """
- the pictures: swap them, and say *add the star from the second picture*. What is brought keeps \
its place and colour, its shape only roughly: this LoRA was trained briefly
- *reuse* in Condition Cache: *off* computes both references at every step, *once* at the first \
only; compare the times
"""
    edits = "one edit of it: a thing of the second picture goes into the first"
    notes = edit_note(graph, "flux2-klein-two-references", change, edits)
    models = editor(graph, TWO)
    titles = ("scene-star", "Picture to edit"), ("scene-square", "Second picture")
    pictures = [encoded(graph, models, *each) for each in titles]
    words = "add the square from the second picture"
    prompt = instructed(graph, models, words, *(each[-1] for each in pictures))
    kept = cache(graph, models.nodes[-1])
    sampling = sample_latent(graph, kept, prompt, models.vae, pictures[0][-1], STEPS)[1:]
    return laid_out(graph, notes, pictures, models.nodes, kept, prompt, sampling)


EDITS: list[Callable[[], Graph]] = [cached_edit, spot_edit_demo, two_references]

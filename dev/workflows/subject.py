"""Example workflows whose condition lies beside the picture: a subject, a picture to draw anew."""

from __future__ import annotations

from collections.abc import Callable

from dev.workflows.graph import Graph
from dev.workflows.parts import (
    GUIDANCE,
    apply_lora,
    cache,
    cached,
    condition,
    demo_lora,
    demo_model,
    demo_note,
    finished,
    flux,
    flux_dev,
    flux_note,
    place,
    plain_prompt,
    prompt,
    sample,
    users_photo,
)

SUBJECT_LORA = "subject_512.safetensors"
SUBJECT_WORDS = "On a rock by the sea at sunset stands this item, waves and spray behind it."
ART_SIDE = 640  # of the picture, as in OminiControlArt's own example


def subject_dev() -> Graph:
    """FLUX.1-dev draws the thing on a photo somewhere else."""
    change = """
- *image_guidance_scale*: FLUX.1-dev needs about 1.5; at 1 a step takes half \
the time, and the thing gets lost
"""
    return _subject("subject-dev-image-guidance", "dev", change, steps=28)


def subject_schnell() -> Graph:
    """FLUX.1-schnell does the same in 8 steps and without image guidance."""
    change = """
- *refresh_every* in Condition Cache: of 8 steps each is a large one, so 1 or 2 may look better
"""
    return _subject("subject-schnell", "schnell", change, steps=8)


def _subject(name: str, kind: str, change: str, steps: int) -> Graph:
    graph = Graph(name)
    first = """
- the picture in *Load Image*: one thing, large, in the middle
- the prompt: call the thing *this item* and say where it is"""
    notes = flux_note(graph, first + change)
    models = flux(graph, kind)
    photo = users_photo(graph, "Your subject")
    encode = condition(graph, photo, models.vae, "right", "crop")
    omini2 = [apply_lora(graph, models.model, encode, SUBJECT_LORA)]
    if kind == "dev":
        omini2.append(graph.add("Omini2ImageGuidance", 1.5, model=omini2[-1]))
    omini2.append(cache(graph, omini2[-1]))
    if kind == "dev":
        text = prompt(graph, models.clip, SUBJECT_WORDS, GUIDANCE)
    else:
        text = plain_prompt(graph, models.clip, SUBJECT_WORDS)
    sampling = sample(graph, omini2[-1], text, models.vae, 512, steps)
    place(graph, notes, models, [([photo], [encode])], omini2, text, sampling)
    return graph


def subject_demo() -> Graph:
    """The demo model draws the thing on a picture somewhere else."""
    graph = Graph("subject-demo-model")
    change = """
- the prompt: *this thing* is the one on the picture; say where it is, and what else there is
- the subject itself: put a picture of one drawn thing on a light background in its place. 64x64 \
pixels, 16 tokens, are what its LoRA was trained with
"""
    real = "subject-dev-image-guidance"
    notes = demo_note(graph, real, change)
    models = demo_model(graph)
    shipped = graph.add("Omini2DemoImage", "scene-thing", title="Your subject")
    encode = condition(graph, shipped, models.vae, "left", "crop", 64)
    omini2 = cached(graph, models.model, encode, demo_lora("subject"))
    words = "this thing on the left and a yellow circle on the right on a green background"
    return finished(graph, notes, models, [([shipped], [encode])], omini2, words, 256, 12)


def art_style() -> Graph:
    """FLUX.1-dev draws a photo anew in a style."""
    graph = Graph("art-style")
    change = """
- the picture in *Load Image*, of any shape: its longer side becomes 512 pixels, and what is left \
over beyond multiples of 16 is cropped, with a warning
- *width* and *height* of the new picture: 640x640 for a square photo, 960x640 or 640x960 for others
- *lora_name*: *irasutoya*, *simpsons* and *snoopy* are in the same folder
- the prompt stays empty: the picture says it all
"""
    notes = flux_note(graph, change)
    models = flux_dev(graph)
    load = users_photo(graph, "Your picture")
    scaled = graph.add("ImageScaleToMaxDimension", "lanczos", 512, image=load["IMAGE"])
    encode = condition(graph, scaled, models.vae, "left")
    lora = apply_lora(graph, models.model, encode, "ghibli.safetensors")
    guided = graph.add("Omini2ImageGuidance", 1.5, model=lora)
    omini2 = [lora, guided, cache(graph, guided)]
    return finished(graph, notes, models, [([load, scaled], [encode])], omini2, "", ART_SIDE, 28)


SUBJECTS: list[Callable[[], Graph]] = [subject_dev, subject_schnell, subject_demo, art_style]

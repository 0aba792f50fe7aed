"""Example workflows for LoRAs of further families, each by its own rules."""

from __future__ import annotations

from collections.abc import Callable

from dev.workflows.files import CHIBI, UNION
from dev.workflows.graph import Graph
from dev.workflows.parts import (
    apply_lora,
    cache,
    condition,
    encoded_image,
    finished,
    flux,
    flux_dev,
    flux_note,
    load_lora,
    place,
    plain_prompt,
    sample,
    users_photo,
)


def omniconsistency() -> Graph:
    """FLUX.1-dev draws a photo anew in a style LoRA's style, everything where it was."""
    graph = Graph("omniconsistency-style")
    change = """
- the picture in *Load Image*, of any shape; *width* and *height* of the new picture in the same one
- the style LoRA (there are 21 others on its page), and with it the first words of the prompt
- *condition_scale* in Apply Omini2 LoRA: lower it where the style should change shapes more
"""
    more = """
### Good to know

The style LoRA goes through *Load LoRA* and acts on the condition too, as it did in training. The \
condition is computed once, which changes nothing in the picture.
"""
    notes = flux_note(graph, change, more)
    models = flux_dev(graph)
    load = users_photo(graph, "Your picture")
    encode = condition(graph, load, models.vae, "fit", "stretch")
    style = load_lora(graph, models.model, CHIBI.name, 1.0)
    lora = "OmniConsistency.safetensors"
    applied = apply_lora(graph, style, encode, lora, family="OmniConsistency")
    omini2 = [style, applied, cache(graph, applied)]
    words = "3D Chibi style, Two people are smiling at the camera."
    return finished(graph, notes, models, [([load], [encode])], omini2, words, 1024, 25)


def ieap_remove() -> Graph:
    """FLUX.1-dev fills the hole that something has left."""
    graph = Graph("ieap-remove")
    change = """
- the picture in *Load Image*; then right-click on it, **Open in MaskEditor**, and paint over what \
shall go, with a margin
- the prompt stays as it is; the file *add.safetensors* of the same page fills the hole with what \
the prompt says, as in *add a cat on the black region*
"""
    more = """
### Good to know

**Apply Omini2 LoRA** puts this LoRA on the condition and, as IEAP does, on the picture too.
"""
    notes = flux_note(graph, change, more)
    models = flux_dev(graph)
    load = users_photo(graph, "Your picture and mask")
    nothing = graph.add("SolidMask", 0.0, 512, 512, title="Nothing")
    black = graph.add("MaskToImage", title="Black", mask=nothing)
    pasted = {"destination": load["IMAGE"], "source": black, "mask": load["MASK"]}
    hole = graph.add("ImageCompositeMasked", 0, 0, True, title="With a hole", **pasted)
    photo = [load, nothing, black, hole]
    encode = condition(graph, hole, models.vae, "aligned", "crop")
    look = encoded_image(graph, encode)
    applied = apply_lora(graph, models.model, encode, "remove.safetensors", family="IEAP")
    omini2 = [applied, cache(graph, applied)]
    words = "Fill the hole of the image"
    return finished(graph, notes, models, [(photo, [encode, look])], omini2, words)


def unicombine() -> Graph:
    """FLUX.1-schnell puts the thing on a photo into the room of a depth map."""
    graph = Graph("unicombine-subject-depth")
    change = """
- *Your depth map*: near is white; and *Your subject*: one thing, large, in the middle
- the prompt: say what there is and where
- *strength_model* in Load LoRA: 1 for pictures as in its training, 0.6 for prompts of your own; \
its authors' *training-free* version goes without
"""
    more = f"""
### Good to know

*{UNION.name}* is the file in the folder *Denoising_LoRA/subject_depth_union* of UniCombine's \
page, under a name of its own; *Load LoRA* loads it.
"""
    notes = flux_note(graph, change, more)
    models = flux(graph, "schnell")
    lanes, union = [], load_lora(graph, models.model, UNION.name, 1.0)
    omini2 = [union]
    for title, kind, placement in (
        ("Your depth map", "depth", "aligned"),
        ("Your subject", "subject", "right"),
    ):
        load = users_photo(graph, title)
        encode = condition(graph, load, models.vae, placement, "crop")
        file = f"unicombine_{kind}.safetensors"
        omini2.append(apply_lora(graph, omini2[-1], encode, file, family="UniCombine"))
        lanes.append(([load], [encode]))
    omini2.append(cache(graph, omini2[-1]))
    words = "A sturdy green ATV on a snow-covered path in a forest."
    prompt = plain_prompt(graph, models.clip, words)
    sampling = sample(graph, omini2[-1], prompt, models.vae, 512, 8)
    place(graph, notes, models, lanes, omini2, prompt, sampling)
    return graph


FAMILIES: list[Callable[[], Graph]] = [omniconsistency, ieap_remove, unicombine]

"""Example workflows for LoRAs of further families, each by its own rules."""

from __future__ import annotations

from collections.abc import Callable

from dev.workflows.graph import Graph, Node
from dev.workflows.parts import (
    apply_lora,
    cache,
    condition,
    finished,
    flux,
    flux_dev,
    flux_files,
    load_lora,
    note,
    place,
    plain_prompt,
    sample,
    square,
)

STYLE = "3D_Chibi_rank128_bf16.safetensors"
UNION = "subject_depth_union.safetensors"


def _photo(graph: Graph, title: str) -> Node:
    return graph.add("LoadImage", "example.png", "image", title=title)


def omniconsistency() -> Graph:
    """FLUX.1-dev draws a photo anew in a style LoRA's style, everything where it was."""
    graph = Graph("omniconsistency-style")
    text = f"""
{flux_files("dev")}

From *showlab/OmniConsistency* into models/loras:

- **OmniConsistency.safetensors**: *Apply Omini2 LoRA* loads it
- **{STYLE}** (folder *LoRAs* there, with 21 other styles): *Load LoRA* loads it, and it acts on \
the condition too, as it did in training

### Change first

- the picture in *Load Image*, of any shape; *width* and *height* of the new picture in the same one
- the style LoRA, and with it the first words of the prompt
- *condition_scale* in Apply Omini2 LoRA: lower it where the style should change shapes more

### Good to know

The condition is computed once, which changes nothing in the picture.
"""
    notes = note(graph, "Read me", text, 700)
    models = flux_dev(graph)
    load = _photo(graph, "Your picture")
    encode = condition(graph, load["IMAGE"], models.vae, "fit", "stretch", 512)
    style = load_lora(graph, models.model, STYLE, 1.0)
    lora = "OmniConsistency.safetensors"
    applied = apply_lora(graph, style, encode, lora, family="OmniConsistency")
    omini2 = [style, applied, cache(graph, applied)]
    words = "3D Chibi style, Two people are smiling at the camera."
    return finished(graph, notes, models, [([load], [encode])], omini2, words, 1024, 25)


def ieap_remove() -> Graph:
    """FLUX.1-dev fills the hole that something has left."""
    graph = Graph("ieap-remove")
    text = f"""
{flux_files("dev")}

From *Cicici1109/IEAP* into models/loras:

- **remove.safetensors** (folder *weights* there)

**Apply Omini2 LoRA** puts it on the condition and, as IEAP does, on the picture too. Don't use \
Load LoRA for it besides: that would put it on the picture twice.

### Change first

- the picture in *Load Image*; then right-click on it, **Open in MaskEditor**, and paint over what \
shall go, with a margin
- the prompt stays as it is; the file **add.safetensors** fills the hole with what the prompt \
says, as in *add a cat on the black region*
"""
    notes = note(graph, "Read me", text, 640)
    models = flux_dev(graph)
    load = _photo(graph, "Your picture and mask")
    nothing = graph.add("SolidMask", 0.0, 512, 512, title="Nothing")
    black = graph.add("MaskToImage", title="Black", mask=nothing)
    pasted = {"destination": load["IMAGE"], "source": black, "mask": load["MASK"]}
    hole = graph.add("ImageCompositeMasked", 0, 0, True, title="With a hole", **pasted)
    photo = [load, nothing, black, hole, square(graph, hole, 512)]
    encode = condition(graph, photo[-1], models.vae, "aligned")
    look = graph.add("PreviewImage", title="The condition", images=photo[-1])
    applied = apply_lora(graph, models.model, encode, "remove.safetensors", family="IEAP")
    omini2 = [applied, cache(graph, applied)]
    words = "Fill the hole of the image"
    return finished(graph, notes, models, [(photo, [encode, look])], omini2, words)


def unicombine() -> Graph:
    """FLUX.1-schnell puts the thing on a photo into the room of a depth map."""
    graph = Graph("unicombine-subject-depth")
    text = f"""
{flux_files("schnell")}

From *Xuan-World/UniCombine* into models/loras, under new names, since OminiControl has a \
*depth.safetensors* too:

- *Condition_LoRA/depth.safetensors*: save as **unicombine_depth.safetensors**
- *Condition_LoRA/subject.safetensors*: save as **unicombine_subject.safetensors**
- the file in *Denoising_LoRA/subject_depth_union*: save as **{UNION}**; *Load LoRA* loads it

### Change first

- *Your depth map*: 512x512, near is white; and *Your subject*: one thing, large, in the middle
- the prompt: say what there is and where
- *strength_model* in Load LoRA: 1 for pictures as in its training, 0.6 for prompts of your own; \
its authors' *training-free* version goes without
"""
    notes = note(graph, "Read me", text, 700)
    models = flux(graph, "schnell")
    lanes, union = [], load_lora(graph, models.model, UNION, 1.0)
    omini2 = [union]
    for title, kind, placement in (
        ("Your depth map", "depth", "aligned"),
        ("Your subject", "subject", "right"),
    ):
        load = _photo(graph, title)
        photo = [load, square(graph, load["IMAGE"], 512)]
        encode = condition(graph, photo[-1], models.vae, placement)
        file = f"unicombine_{kind}.safetensors"
        omini2.append(apply_lora(graph, omini2[-1], encode, file, family="UniCombine"))
        lanes.append((photo, [encode]))
    omini2.append(cache(graph, omini2[-1]))
    words = "A sturdy green ATV on a snow-covered path in a forest."
    prompt = plain_prompt(graph, models.clip, words)
    sampling = sample(graph, omini2[-1], prompt, models.vae, 512, 8)
    place(graph, notes, models, lanes, omini2, prompt, sampling)
    return graph


FAMILIES: list[Callable[[], Graph]] = [omniconsistency, ieap_remove, unicombine]

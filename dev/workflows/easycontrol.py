"""Example workflows for EasyControl's LoRAs on FLUX.1-dev.

Its files have names that OminiControl's have too (canny, depth, ghibli), so they are renamed.
"""

from __future__ import annotations

from collections.abc import Callable

from dev.workflows.graph import Graph, Node, Socket
from dev.workflows.parts import (
    apply_lora,
    cache,
    cached,
    condition,
    finished,
    flux_dev,
    flux_note,
    users_photo,
)

SIDE, STEPS = 1024, 25  # as in EasyControl's own examples, but for a square
CONDITION_SIZE = 512  # what its LoRAs were trained at
GOOD_TO_KNOW = """
### Good to know

These LoRAs were trained so that a condition can be computed once: with *Condition Cache* the \
picture is the same to the last bit, and a step costs little more than plain FLUX.1.
"""


def renamed(name: str) -> str:
    """What one of EasyControl's files is called in the loras folder."""
    return f"easycontrol_{name.lower()}.safetensors"


def spatial(graph: Graph, image: Node | Socket, vae: Socket) -> Node:
    """Edges, a pose, a photo to draw anew: stretched to the square, spread over the picture."""
    return condition(graph, image, vae, "fit", "stretch", CONDITION_SIZE)


def subject(graph: Graph, image: Node | Socket, vae: Socket) -> Node:
    """A thing on a photo: padded to the square, beside the picture."""
    return condition(graph, image, vae, "easycontrol_subject", "pad", CONDITION_SIZE)


def canny() -> Graph:
    """The edges of a photo, of any shape."""
    graph = Graph("easycontrol-canny")
    change = """
- the picture in *Load Image*, of any size
- *width* and *height* of the new picture: the shape of yours, at about 1024x1024 pixels
- the prompt: say what the picture shows
"""
    notes = flux_note(graph, change, GOOD_TO_KNOW)
    models = flux_dev(graph)
    load = users_photo(graph, "Your picture")
    edges = graph.add("Canny", 0.2, 0.4, image=load["IMAGE"])
    encode = spatial(graph, edges, models.vae)
    look = graph.add("PreviewImage", title="Edges", images=edges)
    omini2 = cached(graph, models.model, encode, renamed("canny"))
    lanes, words = [([load], [edges, encode, look])], "a nice car on the beach, evening sun"
    return finished(graph, notes, models, lanes, omini2, words, SIDE, STEPS)


def pose_and_subject() -> Graph:
    """Somebody in the pose of a skeleton, with a thing from a photo."""
    graph = Graph("easycontrol-pose-subject")
    change = """
- *Your pose*: an OpenPose skeleton on black, as pose extensions draw it
- *Your subject*: one thing, large; any shape, it is padded with grey
- the prompt: call the thing *SKS*, and say what the person does
- *condition_scale* of each *Apply Omini2 LoRA*: lower the one that has too much of a say
"""
    notes = flux_note(graph, change, GOOD_TO_KNOW)
    models = flux_dev(graph)
    skeleton, thing = users_photo(graph, "Your pose"), users_photo(graph, "Your subject")
    stance = spatial(graph, skeleton["IMAGE"], models.vae)
    look = subject(graph, thing["IMAGE"], models.vae)
    first = apply_lora(graph, models.model, stance, renamed("pose"))
    second = apply_lora(graph, first, look, renamed("subject"))
    omini2 = [first, second, cache(graph, second)]
    words = "A woman holds a SKS in a library."
    lanes = [([skeleton], [stance]), ([thing], [look])]
    return finished(graph, notes, models, lanes, omini2, words, SIDE, STEPS)


def ghibli() -> Graph:
    """A portrait, drawn anew."""
    graph = Graph("easycontrol-ghibli")
    change = """
- the picture in *Load Image*: a portrait; the LoRA was trained on faces
- *width* and *height* of the new picture: the shape of yours
- the prompt: leave its first words as they are, they switch the style on; you may add what the \
picture shows
"""
    notes = flux_note(graph, change, GOOD_TO_KNOW)
    models = flux_dev(graph)
    load = users_photo(graph, "Your portrait")
    encode = spatial(graph, load["IMAGE"], models.vae)
    omini2 = cached(graph, models.model, encode, renamed("Ghibli"))
    words = "Ghibli Studio style, Charming hand-drawn anime-style illustration"
    return finished(graph, notes, models, [([load], [encode])], omini2, words, SIDE, STEPS)


EASYCONTROL: list[Callable[[], Graph]] = [canny, pose_and_subject, ghibli]

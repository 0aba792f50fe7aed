"""Example workflows that give a picture back what it has lost: colour, sharpness."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dev.workflows.graph import Graph, Node, Socket
from dev.workflows.parts import Base, base, cached, condition, encoded_image, finished


def colouring(demo: bool) -> Graph:
    """A grey photo gets colours."""
    b = base("colouring", demo)
    change = """
- the picture; *Y*, the first output of *Image RGB to YUV*, is its brightness alone
- the colours in the prompt
- *condition_scale* in Apply Omini2 LoRA: lower it where the grey shows through
"""
    notes = b.note("colouring", change)
    photo = b.photo("Your grey picture")
    grey = b.graph.add("ImageRGBToYUV", title="Grey", image=photo[-1])
    words = "a steaming cup of coffee on a rustic wooden table, warm evening light"
    if demo:
        words = "a big orange star and a big cyan ring on a purple background"
    lora = b.lora("coloring.safetensors", "colouring")
    return _restored(b, notes, photo, grey, grey["Y"], words, lora)


def deblurring(demo: bool) -> Graph:
    """A blurred photo gets sharp."""
    b = base("deblurring", demo)
    change = """
- the picture; if yours is blurred already, take *Image Blur* out
- *sigma* in Image Blur: how blurred the condition is, 10 at most
- the prompt: say what the picture shows; the blur leaves it to the words
"""
    notes = b.note("deblurring", change)
    photo = b.photo("Your picture")
    radius, sigma = (15, 5.0) if demo else (31, 10.0)
    blurred = b.graph.add("ImageBlur", radius, sigma, title="Blur", image=photo[-1])
    words = "a tabby cat looks into the camera, every hair sharp"
    if demo:
        words = "a big yellow star and a big pink ring on a blue background"
    lora = b.lora("deblurring.safetensors", "deblurring")
    return _restored(b, notes, photo, blurred, blurred.socket, words, lora)


def _restored(
    b: Base, notes: Node, photo: list[Node], lost: Node, image: Socket, words: str, lora: str
) -> Graph:
    """The graph from the picture that has lost something to the new one."""
    graph = b.graph
    encode = condition(graph, image, b.models.vae, "aligned")
    look = encoded_image(graph, encode)
    omini2 = cached(graph, b.models.model, encode, lora)
    return finished(
        graph, notes, b.models, [(photo, [lost, encode, look])], omini2, words, b.side, b.steps
    )


RESTORING: list[Callable[[], Graph]] = [
    partial(build, demo) for build in (colouring, deblurring) for demo in (False, True)
]

"""Example workflows for Compact Tokens, each with FLUX.1-dev and with the demo model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dev.workflows.graph import Graph, Node, Socket
from dev.workflows.parts import (
    GUIDANCE,
    PHOTO_EDGES,
    SCENE_EDGES,
    Base,
    base,
    cached,
    compact,
    condition,
    edges,
    finished,
    place,
    prompt,
    sample_latent,
    shown,
    users_photo,
)


def compressed_depth(demo: bool) -> Graph:
    """Depth at a quarter of the tokens."""
    b = base("depth-compressed", demo)
    change = """
- the picture: a depth map, near is white; a depth extension makes one of your photo
- *compression* in Compact Tokens: 0.5 leaves a quarter of the tokens, 0.25 a sixteenth
- *position_correcting*: switch it off once to see what it does
"""
    notes = b.note("depth-compressed", change)
    picture = "scene-depth" if demo else "room-depth"
    shipped = b.graph.add("Omini2DemoImage", picture, title="Depth map")
    encode = condition(b.graph, shipped, b.models.vae, "aligned", "crop", b.side)
    compacted = compact(b.graph, encode, compression=0.5)
    omini2 = cached(b.graph, b.models.model, compacted, b.lora("depth.safetensors", "depth"))
    photo = [shipped]
    words = "three stone balls and a wooden crate in an empty hall, evening light"
    if demo:
        words = "a big red star and a big green ring on a white background"
    steps = [encode, compacted]
    return finished(
        b.graph, notes, b.models, [(photo, steps)], omini2, words, b.side, b.steps, compacted
    )


def pruned_edges(demo: bool) -> Graph:
    """Edges without the tokens that show none."""
    b = base("edges-pruned", demo)
    change = """
- the picture, and Canny's thresholds: fewer edges, fewer tokens
- *grow* in Compact Tokens: keeps a rim of tokens around the edges
- *threshold*: how faint an edge may be
"""
    notes = b.note("edges-pruned", change)
    photo = b.photo("Your picture")
    thresholds = SCENE_EDGES if demo else PHOTO_EDGES
    canny, encode = edges(b.graph, photo[-1], b.models.vae, thresholds)
    compacted = compact(b.graph, encode, prune="empty")
    omini2 = cached(b.graph, b.models.model, compacted, b.lora("canny.safetensors", "edges_pruned"))
    words = "a rocket lifts off into a starry night sky"
    if demo:
        words = "a big cyan star and a big red ring on a white background"
    steps = [canny, encode, compacted]
    return finished(
        b.graph, notes, b.models, [(photo, steps)], omini2, words, b.side, b.steps, compacted
    )


NO_LORA_YET = """
### Good to know

No LoRA trained for token integration has been published yet. fill.safetensors is the closest, but \
was trained on whole pictures with a black hole: expect seams.
"""


def integrated(
    b: Base, notes: Node, photo: list[Node], image: Socket, mask: Socket, words: str, resize: str
) -> Graph:
    """Paints what the mask marks and leaves every pixel outside it as it was."""
    graph, vae = b.graph, b.models.vae
    encode = condition(graph, image, vae, "aligned", resize, b.side)
    compacted = compact(graph, encode, mask, token_integration=True)
    omini2 = cached(graph, b.models.model, compacted, b.lora("fill.safetensors", "inpainting"))
    text = prompt(graph, b.models.clip, words, GUIDANCE)
    if resize == "crop":
        latent = graph.add("EmptySD3LatentImage", b.side, b.side, 1)
    else:  # at denoise 1 only the size of this latent counts
        latent = graph.add("VAEEncode", pixels=image, vae=vae)
    sampling = sample_latent(graph, omini2[-1], text, vae, latent, b.steps)
    links = {"samples": sampling[1], "reference": encode["image"], "vae": vae}
    kept = graph.add("Omini2KeepUnchanged", 8, image=sampling[-1], **links)
    steps = [encode, compacted, shown(graph, compacted)]
    place(graph, notes, b.models, [(photo, steps)], omini2, text, [*sampling, kept])
    return graph


def inpainting(demo: bool) -> Graph:
    """Paints a part of a picture anew."""
    b = base("inpainting", demo)
    graph = b.graph
    if demo:
        change = "- the mask: *x* and *y* move the hole, the second *SolidMask* is its size"
        shipped = graph.add("Omini2DemoImage", "scene")
        nothing = graph.add("SolidMask", 0.0, b.side, b.side, title="Nothing")
        hole = graph.add("SolidMask", 1.0, 112, 128, title="Hole")
        placed = {"destination": nothing, "source": hole}
        mask = graph.add("MaskComposite", 64, 128, "add", title="Mask", **placed)
        photo, image, paint = [shipped, nothing, hole, mask], shipped.socket, mask.socket
    else:
        change = """
- the picture in *Load Image*, of any size; then right-click on it, **Open in MaskEditor**, and \
paint over what shall change (without a mask the run stops and says so)
- the prompt: what shall be there
- *feather* in Omini2 Keep Unchanged: how softly the new part ends; what was not painted keeps \
its own pixels
"""
        load = users_photo(graph, "Your picture and mask")
        photo, image, paint = [load], load["IMAGE"], load["MASK"]
    notes = b.note("inpainting", change, NO_LORA_YET)
    words = "a cup of green tea with a mint leaf"
    if demo:
        words = (
            "a big yellow star at the top and a big green circle at the bottom on a blue background"
        )
    return integrated(b, notes, photo, image, paint, words, "crop")


def outpainting(demo: bool) -> Graph:
    """Continues a picture beyond its sides."""
    b = base("outpainting", demo)
    change = """
- the picture
- *left*, *top*, *right*, *bottom* in Pad Image for Outpainting: multiples of 16 pixels
- the prompt: describe the whole picture
"""
    notes = b.note("outpainting", change, NO_LORA_YET)
    border = b.side // 4
    # The demo model knows one size of picture: the photo becomes its middle.
    photo = b.photo("Your picture", b.side - 2 * border)
    pads = (border,) * 4 if demo else (border, 0, border, 0)
    pad = b.graph.add("ImagePadForOutpaint", *pads, 0, image=photo[-1])
    words = "a tabby cat on a sofa in a sunny living room"
    if demo:
        words = "a blue background"
    # Tokens beside the padding hold some of its grey, so they are painted too.
    paint = b.graph.add("GrowMask", 16, False, title="One token more", mask=pad["MASK"])
    photo = [*photo, pad, paint]
    return integrated(b, notes, photo, pad["IMAGE"], paint.socket, words, "off")


COMPACT: list[Callable[[], Graph]] = [
    partial(build, demo)
    for build in (compressed_depth, pruned_edges, inpainting, outpainting)
    for demo in (False, True)
]

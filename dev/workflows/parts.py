"""Parts that the example workflows share.

Columns from left to right: notes, photos and model, conditions, Omini2, prompt and sampling,
picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dev.workflows.files import (
    CLIP_L,
    FLUX_DEV,
    FLUX_SCHNELL,
    FLUX_VAE,
    KONTEXT,
    T5,
)
from dev.workflows.graph import COLUMN, FILES, MESSAGES, PREVIEW, Graph, Node, Socket

NOTES, PICTURES, CONDITIONS, OMINI2, SAMPLING, RESULT = range(6)
Lane = tuple[list[Node], list[Node]]  # a photo's nodes, those that make a condition of it
WIDE = COLUMN + 100  # width of the result's node
PHOTO_EDGES = 0.2, 0.4  # thresholds of Canny
UNICOMBINES_TOO = "canny.safetensors", "depth.safetensors", "fill.safetensors"
SCENE_EDGES = 0.1, 0.2  # as the demo model's LoRAs were trained with
GUIDANCE = 3.5  # what FLUX.1-dev takes where nothing says otherwise


@dataclass
class Models:
    """A FLUX.1's three parts, and the nodes that load them."""

    model: Socket
    clip: Socket
    vae: Socket
    nodes: list[Node]


def flux(graph: Graph, kind: str) -> Models:
    """FLUX.1 from one file of 8-bit weights: ``dev`` or ``schnell``."""
    file = {"dev": FLUX_DEV, "schnell": FLUX_SCHNELL}[kind]
    node = graph.add("CheckpointLoaderSimple", file.name)
    return Models(node["MODEL"], node["CLIP"], node["VAE"], [node])


def flux_dev(graph: Graph) -> Models:
    """FLUX.1-dev."""
    return flux(graph, "dev")


def kontext(graph: Graph) -> Models:
    """The stock loaders of FLUX.1 Kontext."""
    model = graph.add("UNETLoader", KONTEXT.name, "default")
    clip = graph.add("DualCLIPLoader", CLIP_L.name, T5.name, "flux", "default")
    vae = graph.add("VAELoader", FLUX_VAE.name)
    return Models(model.socket, clip.socket, vae.socket, [model, clip, vae])


def demo_model(graph: Graph) -> Models:
    """The model that comes with the extension."""
    node = graph.add("Omini2DemoModel")
    return Models(node["model"], node["clip"], node["vae"], [node])


def users_photo(graph: Graph, title: str) -> Node:
    """The user's picture; until one is chosen, the one that every ComfyUI has.

    Condition Encode brings it to its size. What acts on pixels before that (edges, a blur) wants
    the size first: see :func:`square`.
    """
    return graph.add("LoadImage", "example.png", "image", title=title)


def square(graph: Graph, image: Node | Socket, side: int) -> Node:
    """Crops around the centre and scales."""
    return graph.add("ImageScale", "lanczos", side, side, "center", image=image)


def edges(
    graph: Graph, photo: Node, vae: Socket, thresholds: tuple[float, float] = PHOTO_EDGES
) -> list[Node]:
    """The photo's edges, and the condition made of them."""
    canny = graph.add("Canny", *thresholds, image=photo)
    return [canny, condition(graph, canny, vae, "aligned")]


def edge_condition(
    graph: Graph, photo: Node, vae: Socket, thresholds: tuple[float, float] = PHOTO_EDGES
) -> list[Node]:
    """The photo's edges as a condition, and a look at them; the second node is the condition."""
    canny, encode = edges(graph, photo, vae, thresholds)
    return [canny, encode, graph.add("PreviewImage", title="Edges", images=canny)]


def condition(
    graph: Graph,
    image: Node | Socket | None,
    vae: Socket,
    placement: str,
    resize: str = "off",
    size: int = 512,
) -> Node:
    """An image as a condition; none where it comes from outside of a subgraph."""
    values = (placement, 0, 0, 1.0, resize, size)
    links = {} if image is None else {"image": image}
    return graph.add("Omini2ConditionEncode", *values, **links, vae=vae)


def encoded_image(graph: Graph, encode: Node) -> Node:
    """A look at what Condition Encode has made of its image."""
    return graph.add("PreviewImage", title="The condition", images=encode["image"])


def load_lora(graph: Graph, model: Node | Socket, lora: str, strength: float) -> Node:
    """An ordinary LoRA."""
    return graph.add("LoraLoaderModelOnly", lora, strength, model=model)


def apply_lora(
    graph: Graph, model: Node | Socket, condition: Node, lora: str, family: str = "auto"
) -> Node:
    """A condition LoRA with its defaults."""
    if lora in UNICOMBINES_TOO and family == "auto":
        family = "OminiControl"  # or each run would ask
    values = (lora, 1.0, 1.0, "auto", 0.0, 1.0, family)
    return graph.add("Omini2ApplyLoRA", *values, model=model, condition=condition)


def cache(graph: Graph, model: Node | Socket, references: str = "auto") -> Node:
    """The condition cache with its defaults, but for what is named."""
    return graph.add("Omini2ConditionCache", "auto", 5, "model", "auto", references, model=model)


def prompt(graph: Graph, clip: Socket, text: str, guidance: float) -> list[Node]:
    """Text, the prompt with FLUX's own guidance, and what KSampler wants as the negative one.

    cfg 1 never evaluates a negative prompt, but the socket has to be filled.
    """
    encode = graph.add("CLIPTextEncode", text, title="Prompt", clip=clip)
    positive = graph.add("FluxGuidance", guidance, conditioning=encode)
    return [encode, positive, no_negative(graph, encode)]


def short_prompt(graph: Graph, clip: Socket, text: str) -> list[Node]:
    """The fewest nodes: both of KSampler's sockets get the text.

    At cfg 1 the negative one is never looked at, and FLUX.1-dev's guidance is `GUIDANCE` where no
    node says otherwise.
    """
    return [graph.add("CLIPTextEncode", text, title="Prompt", clip=clip)]


def no_negative(graph: Graph, conditioning: Node) -> Node:
    """What a sampler at cfg 1 wants as the negative prompt."""
    title = "No negative prompt"
    return graph.add("ConditioningZeroOut", title=title, conditioning=conditioning)


def plain_prompt(graph: Graph, clip: Socket, text: str) -> list[Node]:
    """The same for FLUX.1-schnell, which takes no guidance."""
    encode = graph.add("CLIPTextEncode", text, title="Prompt", clip=clip)
    return [encode, no_negative(graph, encode)]


def sample(
    graph: Graph, model: Node, text: list[Node], vae: Socket, side: int, steps: int
) -> list[Node]:
    """An empty picture through KSampler; the last node gives the decoded picture."""
    empty = graph.add("EmptySD3LatentImage", side, side, 1)
    return sample_latent(graph, model, text, vae, empty, steps)


def sample_latent(
    graph: Graph,
    model: Node,
    text: Sequence[Node | Socket],
    vae: Socket,
    latent: Node,
    steps: int,
    cfg: float = 1.0,
) -> list[Node]:
    """A latent, first in the list, through KSampler; the last node gives the decoded picture.

    Args:
        text: the last two are the positive and the negative prompt; one alone is both.
    """
    settings = (1, "fixed", steps, cfg, "euler", "simple", 1.0)
    conditioning = {"positive": text[-2:][0], "negative": text[-1]}
    sampler = graph.add("KSampler", *settings, model=model, **conditioning, latent_image=latent)
    return [latent, sampler, graph.add("VAEDecode", samples=sampler, vae=vae)]


def note(graph: Graph, title: str, text: str) -> Node:
    """What to know before the first run; `FILES` in it becomes the files that the graph names."""
    return graph.add("MarkdownNote", text.strip() + "\n", title=title)


FLUX_NOTE = f"""
### Files

{FILES}

The checkpoint is model, text encoders and VAE in one. **Apply Omini2 LoRA** loads the LoRAs in \
models/loras; *Load LoRA* would put them on the whole model.

### Change first

{{change}}

### Another FLUX.1

In 16 bits or GGUF: put *Load Diffusion Model* (or GGUF's), *DualCLIPLoader* and *Load VAE* in \
the checkpoint's place.
"""


def flux_note(graph: Graph, change: str, more: str = "") -> Node:
    """Which files a graph with FLUX.1 needs, and what to change first."""
    return note(graph, "Read me", FLUX_NOTE.format(change=change.strip()) + more)


def cached(graph: Graph, model: Node | Socket, condition: Node, lora: str) -> list[Node]:
    """A condition LoRA and the condition cache."""
    applied = apply_lora(graph, model, condition, lora)
    return [applied, cache(graph, applied)]


DEMO_NOTE = """
### Nothing to download

Press **Run**: model, LoRA and picture come with the extension. The small model knows a world of \
drawn shapes: circle, square, triangle, star, ring and cross in eight colours, plain, striped or \
dotted. Prompts are *a big red ring on the right and a small blue star on the left on a grey \
background*. It knows no photos, only the pictures called *scene*.

### Change first

{change}

### For real pictures

Open the template **{name}**: the same graph with FLUX.1-dev.
"""


def demo_note(graph: Graph, name: str, change: str) -> Node:
    """The same for the demo model; the template of that name is for real pictures."""
    return note(graph, "Read me", DEMO_NOTE.format(change=change.strip(), name=name))


def demo_lora(task: str) -> str:
    """The demo model's LoRA, as dev/demo_model/train_loras.py names it."""
    return f"omini2_demo_{task}.safetensors"


@dataclass
class Base:
    """What differs between the two versions of a workflow."""

    graph: Graph
    models: Models
    demo: bool
    side: int
    steps: int

    def lora(self, file: str, task: str) -> str:
        """The LoRA to apply: a published one, or the demo model's for that task."""
        return demo_lora(task) if self.demo else file

    def photo(self, title: str, demo_side: int | None = None) -> list[Node]:
        """The picture to start from, as large as the new one; the last node gives it."""
        if self.demo:
            shipped = self.graph.add("Omini2DemoImage", "scene")
        else:
            shipped = users_photo(self.graph, title)
        return [shipped, square(self.graph, shipped, demo_side or self.side)]

    def note(self, name: str, change: str, warning: str = "") -> Node:
        """What to know before the first run."""
        if self.demo:
            return demo_note(self.graph, name, change)
        return flux_note(self.graph, change, warning)

    def finished(
        self, notes: Node, lane: Lane, omini2: list[Node], words: str, **more: Any
    ) -> Graph:
        """See the function of that name."""
        sizes = self.side, self.steps
        return finished(self.graph, notes, self.models, [lane], omini2, words, *sizes, **more)


def base(name: str, demo: bool) -> Base:
    """An empty graph with the model that it is for."""
    graph = Graph(f"{name}-demo-model" if demo else name)
    models = demo_model(graph) if demo else flux_dev(graph)
    return Base(graph, models, demo, 256 if demo else 512, 12 if demo else 28)


def compact(graph: Graph, condition: Node, mask: Socket | None = None, **changes: Any) -> Node:
    """Compact Tokens with its defaults but for what is named."""
    values = {
        "compression": 1.0,
        "position_correcting": True,
        "prune": "off",
        "threshold": 0.1,
        "grow": 0,
        "token_integration": False,
        "shift_schedule": True,
    }
    values.update(changes)
    links = {} if mask is None else {"mask": mask}
    return graph.add("Omini2CompactTokens", *values.values(), condition=condition, **links)


def shown(graph: Graph, compacted: Node) -> Node:
    """A look at the tokens that are kept."""
    return graph.add("PreviewImage", title="Kept tokens", images=compacted["tokens"])


def numbered(group: int, what: str, number: int, among: Sequence[object]) -> str:
    """A group's title: its own number, and in words which of several it is."""
    which = f"{('first', 'second', 'third')[number - 1]} " if len(among) > 1 else ""
    return f"{group}  {(which + what).capitalize()}"


def place(
    graph: Graph,
    notes: Node,
    models: Models,
    lanes: list[Lane],
    omini2: list[Node],
    text: list[Node],
    sampling: list[Node],
) -> None:
    """Lays a graph out from left to right and closes it with the picture."""
    # Nothing stands below the note: it grows with its text where nodes are drawn as HTML.
    graph.stack(NOTES, 0, "", notes)
    below_pictures = below_conditions = 0
    for number, (photo, steps) in enumerate(lanes, 1):
        if photo:
            title = numbered(1, "picture", number, lanes)
            below_pictures = graph.stack(PICTURES, below_pictures, title, *photo)
        title = numbered(3, "condition", number, lanes)
        below_conditions = graph.stack(CONDITIONS, below_conditions, title, *steps)
    graph.stack(PICTURES, below_pictures, "2  Model", *models.nodes)
    if omini2:
        graph.stack(OMINI2, 0, "4  Omini2", *omini2)
    below_text = graph.stack(SAMPLING, 0, "5  Prompt", *text)
    to_sampler = 1 + [node.kind for node in sampling].index("KSampler")
    graph.stack(SAMPLING, below_text, "6  Sampling", *sampling[:to_sampler], room=PREVIEW)
    save = graph.add("SaveImage", f"omini2/{graph.name}", images=sampling[-1])
    decoded, *more = sampling[to_sampler:]  # below the picture, which is to be in view
    graph.stack(RESULT, MESSAGES, "7  Result", decoded, save, *more, width=WIDE)


def finished(
    graph: Graph,
    notes: Node,
    models: Models,
    lanes: list[Lane],
    omini2: list[Node],
    words: str,
    side: int = 512,
    steps: int = 28,
    compacted: Node | None = None,
) -> Graph:
    """Prompt and sampler behind the conditions, and all in its place.

    Args:
        compacted: a Compact Tokens whose kept tokens are looked at below the last condition.
    """
    text = prompt(graph, models.clip, words, GUIDANCE)
    sampling = sample(graph, omini2[-1], text, models.vae, side, steps)
    if compacted:
        lanes[-1][1].append(shown(graph, compacted))
    place(graph, notes, models, lanes, omini2, text, sampling)
    return graph

"""Parts that the example workflows share.

Columns from left to right: notes, photos, models and conditions, Omini2 and prompt, sampling,
picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dev.workflows.graph import COLUMN, Graph, Node, Socket

NOTES, PICTURES, MODELS, OMINI2, SAMPLING, RESULT = range(6)
Lane = tuple[list[Node], list[Node]]  # a photo's nodes, those that make a condition of it
WIDE = COLUMN + 180  # width of the result's node
PHOTO_EDGES = 0.2, 0.4  # thresholds of Canny
UNICOMBINES_TOO = "canny.safetensors", "depth.safetensors", "fill.safetensors"
SCENE_EDGES = 0.1, 0.2  # as the demo model's LoRAs were trained with


@dataclass
class Models:
    """A FLUX.1's three parts, and the nodes that load them."""

    model: Socket
    clip: Socket
    vae: Socket
    nodes: list[Node]


def flux(graph: Graph, kind: str) -> Models:
    """The stock loaders for FLUX.1: ``dev`` or ``schnell``."""
    model = graph.add("UNETLoader", f"flux1-{kind}.safetensors", "default")
    text = ("clip_l.safetensors", "t5xxl_fp8_e4m3fn.safetensors", "flux", "default")
    clip = graph.add("DualCLIPLoader", *text)
    vae = graph.add("VAELoader", "ae.safetensors")
    return Models(model.socket, clip.socket, vae.socket, [model, clip, vae])


def flux_dev(graph: Graph) -> Models:
    """The stock loaders for FLUX.1-dev."""
    return flux(graph, "dev")


def demo_model(graph: Graph) -> Models:
    """The model that comes with the extension."""
    node = graph.add("Omini2DemoModel")
    return Models(node["model"], node["clip"], node["vae"], [node])


def users_photo(graph: Graph, title: str) -> list[Node]:
    """The user's picture at 512x512; the last node gives it.

    Until one is chosen it is the picture that every ComfyUI has in its input folder.
    """
    photo = graph.add("LoadImage", "example.png", "image", title=title)
    return [photo, square(graph, photo["IMAGE"], 512)]


def square(graph: Graph, image: Node | Socket, side: int) -> Node:
    """Crops around the centre and scales: an aligned condition has the picture's size."""
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
    image: Node | Socket,
    vae: Socket,
    placement: str,
    resize: str = "off",
    size: int = 512,
) -> Node:
    """An image as a condition."""
    values = (placement, 0, 0, 1.0, resize, size)
    return graph.add("Omini2ConditionEncode", *values, image=image, vae=vae)


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
    empty = graph.add("ConditioningZeroOut", title="No negative prompt", conditioning=encode)
    return [encode, positive, empty]


def plain_prompt(graph: Graph, clip: Socket, text: str) -> list[Node]:
    """The same for FLUX.1-schnell, which takes no guidance."""
    encode = graph.add("CLIPTextEncode", text, title="Prompt", clip=clip)
    empty = graph.add("ConditioningZeroOut", title="No negative prompt", conditioning=encode)
    return [encode, empty]


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
    """A latent, first in the list, through KSampler; the last node gives the decoded picture."""
    settings = (1, "fixed", steps, cfg, "euler", "simple", 1.0)
    conditioning = {"positive": text[-2], "negative": text[-1]}
    sampler = graph.add("KSampler", *settings, model=model, **conditioning, latent_image=latent)
    return [latent, sampler, graph.add("VAEDecode", samples=sampler, vae=vae)]


def note(graph: Graph, title: str, text: str, height: int) -> Node:
    """What to know before the first run."""
    node = graph.add("MarkdownNote", text.strip() + "\n", title=title)
    node.height = height
    return node


def flux_dev_note(graph: Graph, loras: dict[str, str], change: str) -> Node:
    """Which files a graph with FLUX.1-dev needs, and what to change first."""
    return flux_note(graph, "dev", loras, change)


def flux_note(
    graph: Graph,
    kind: str,
    loras: dict[str, str],
    change: str,
    source: str = "Yuanshi/OminiControl",
) -> Node:
    """Which files a graph with FLUX.1 needs, and what to change first.

    Args:
        kind: dev or schnell.
        loras: file in the loras folder -> the repository's folder that it is in.
        source: the repository.
    """
    files = "\n".join(f"- **{file}** (folder *{folder}* there)" for file, folder in loras.items())
    text = f"""
{flux_files(kind)}

From *{source}* into models/loras:

{files}

**Apply Omini2 LoRA** loads these. Don't use Load LoRA for them: it would apply them to the whole \
model.

### Change first

{change.strip()}
"""
    return note(graph, "Read me", text, 600)


def flux_files(kind: str) -> str:
    """Which files FLUX.1 takes: ``dev`` or ``schnell``."""
    return f"""
### Files

- models/diffusion_models: **flux1-{kind}.safetensors**
- models/vae: **ae.safetensors**
- models/text_encoders: **clip_l.safetensors**
- models/text_encoders: **t5xxl_fp8_e4m3fn.safetensors**

Model and VAE are in the Hugging Face repository *black-forest-labs/FLUX.1-{kind}*, the text \
encoders in *comfyanonymous/flux_text_encoders*.
""".strip()


def cached(graph: Graph, model: Node | Socket, condition: Node, lora: str) -> list[Node]:
    """A condition LoRA and the condition cache."""
    applied = apply_lora(graph, model, condition, lora)
    return [applied, cache(graph, applied)]


DEMO_NOTE = """
### Nothing to download

Press **Run**: model, LoRA and picture come with the extension. The small model knows a world of \
drawn shapes: circle, square, triangle, star, ring and cross in eight colours, plain, striped or \
dotted. Prompts are *a big red ring on the right and a small blue star on the left on a grey \
background*.

### Change first

{change}

### For real pictures

Open the template **{name}**: the same graph with FLUX.1-dev.
"""


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
        """The picture to start from; the last node gives it."""
        if not self.demo:
            return users_photo(self.graph, title)
        shipped = self.graph.add("Omini2DemoImage", "scene")
        return [shipped, square(self.graph, shipped, demo_side or self.side)]

    def note(self, name: str, lora: str, folder: str, change: str, warning: str = "") -> Node:
        """What to know before the first run."""
        if self.demo:
            text = DEMO_NOTE.format(change=change.strip(), name=name)
            return note(self.graph, "Read me", text, 400)
        return flux_dev_note(self.graph, {lora: folder}, change.strip() + "\n" + warning)

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
    below_pictures = 0
    below_models = graph.stack(MODELS, 0, "2  FLUX.1", *models.nodes)
    for number, (photo, steps) in enumerate(lanes, 1):
        which = f" {number}" if len(lanes) > 1 else ""
        below_pictures = graph.stack(PICTURES, below_pictures, f"1  Picture{which}", *photo)
        below_models = graph.stack(MODELS, below_models, f"3  Condition{which}", *steps)
    below_omini2 = graph.stack(OMINI2, 0, "4  Omini2", *omini2)
    graph.stack(OMINI2, below_omini2, "5  Prompt", *text)
    graph.stack(SAMPLING, 0, "6  Sampling", *sampling)
    save = graph.add("SaveImage", f"omini2/{graph.name}", images=sampling[-1])
    graph.stack(RESULT, 0, "7  Result", save, width=WIDE)


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
    text = prompt(graph, models.clip, words, 3.5)
    sampling = sample(graph, omini2[-1], text, models.vae, side, steps)
    if compacted:
        lanes[-1][1].append(shown(graph, compacted))
    place(graph, notes, models, lanes, omini2, text, sampling)
    return graph

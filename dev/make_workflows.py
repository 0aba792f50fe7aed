"""Makes example_workflows/*.json: `python -m dev.make_workflows`.

One function a workflow, put together from parts that they share. Columns from left to right:
notes, photos, models and conditions, Omini2 and prompt, sampling, picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dev.graph import COLUMN, Graph, Node, Socket
from dev.paths import ROOT

FOLDER = ROOT / "example_workflows"
NOTES, PICTURES, MODELS, OMINI2, SAMPLING, RESULT = range(6)
WIDE = COLUMN + 180  # width of the result's node


# --- parts -------------------------------------------------------------------------------------


@dataclass
class Models:
    """A FLUX.1's three parts, and the nodes that load them."""

    model: Socket
    clip: Socket
    vae: Socket
    nodes: list[Node]


def flux_dev(graph: Graph) -> Models:
    """The stock loaders for FLUX.1-dev."""
    model = graph.add("UNETLoader", "flux1-dev.safetensors", "default")
    text = ("clip_l.safetensors", "t5xxl_fp8_e4m3fn.safetensors", "flux", "default")
    clip = graph.add("DualCLIPLoader", *text)
    vae = graph.add("VAELoader", "ae.safetensors")
    return Models(model.socket, clip.socket, vae.socket, [model, clip, vae])


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


def edge_condition(graph: Graph, photo: Node, vae: Socket) -> list[Node]:
    """The photo's edges as a condition, and a look at them; the second node is the condition."""
    canny = graph.add("Canny", 0.2, 0.4, image=photo)
    encode = condition(graph, canny, vae, "aligned")
    return [canny, encode, graph.add("PreviewImage", title="Edges", images=canny)]


def condition(graph: Graph, image: Node, vae: Socket, placement: str) -> Node:
    """An image as a condition."""
    return graph.add("Omini2ConditionEncode", placement, 0, 0, 1.0, image=image, vae=vae)


def apply_lora(graph: Graph, model: Node | Socket, condition: Node, lora: str) -> Node:
    """A condition LoRA with its defaults."""
    values = (lora, 1.0, 1.0, "auto", 0.0, 1.0)
    return graph.add("Omini2ApplyLoRA", *values, model=model, condition=condition)


def cache(graph: Graph, model: Node) -> Node:
    """The condition cache with its defaults."""
    return graph.add("Omini2ConditionCache", "auto", 5, "model", "auto", model=model)


def prompt(graph: Graph, clip: Socket, text: str, guidance: float) -> list[Node]:
    """Text, the prompt with FLUX's own guidance, and what KSampler wants as the negative one.

    cfg 1 never evaluates a negative prompt, but the socket has to be filled.
    """
    encode = graph.add("CLIPTextEncode", text, title="Prompt", clip=clip)
    positive = graph.add("FluxGuidance", guidance, conditioning=encode)
    empty = graph.add("ConditioningZeroOut", title="No negative prompt", conditioning=encode)
    return [encode, positive, empty]


def sample(
    graph: Graph, model: Node, text: list[Node], vae: Socket, side: int, steps: int
) -> list[Node]:
    """An empty picture through KSampler; the last node gives the decoded picture."""
    empty = graph.add("EmptySD3LatentImage", side, side, 1)
    settings = (1, "fixed", steps, 1.0, "euler", "simple", 1.0)
    conditioning = {"positive": text[-2], "negative": text[-1]}
    sampler = graph.add("KSampler", *settings, model=model, **conditioning, latent_image=empty)
    return [empty, sampler, graph.add("VAEDecode", samples=sampler, vae=vae)]


def note(graph: Graph, title: str, text: str, height: int) -> Node:
    """What to know before the first run."""
    node = graph.add("MarkdownNote", text.strip() + "\n", title=title)
    node.height = height
    return node


def flux_dev_note(graph: Graph, loras: dict[str, str], change: str) -> Node:
    """Which files a graph with FLUX.1-dev needs, and what to change first.

    Args:
        loras: file in the loras folder -> the repository's folder that it is in.
    """
    files = "\n".join(f"- **{file}** (folder *{folder}* there)" for file, folder in loras.items())
    text = f"""
### Files

- models/diffusion_models: **flux1-dev.safetensors**
- models/vae: **ae.safetensors**
- models/text_encoders: **clip_l.safetensors**
- models/text_encoders: **t5xxl_fp8_e4m3fn.safetensors**

Model and VAE are in the Hugging Face repository *black-forest-labs/FLUX.1-dev*, the text encoders \
in *comfyanonymous/flux_text_encoders*.

From *Yuanshi/OminiControl* into models/loras:

{files}

**Apply Omini2 LoRA** loads these. Don't use Load LoRA for them: it would apply them to the whole \
model.

### Change first

{change.strip()}
"""
    return note(graph, "Read me", text, 600)


def place(
    graph: Graph,
    notes: Node,
    models: Models,
    lanes: list[tuple[list[Node], list[Node]]],
    omini2: list[Node],
    text: list[Node],
    sampling: list[Node],
) -> None:
    """Lays a graph out from left to right and closes it with the picture.

    Args:
        lanes: per condition its photo's nodes and the nodes that make a condition of it.
    """
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


# --- workflows ---------------------------------------------------------------------------------


def try_it() -> Graph:
    """Edges with the demo model: runs anywhere right after it is opened."""
    graph = Graph("try-it-without-a-checkpoint")
    notes = note(
        graph,
        "Read me",
        """
### Nothing to download

Press **Run**. Model, LoRA and photo come with the extension, and any CPU is through in \
seconds. The small model is not trained yet, so what it draws is noise: this graph shows how \
the nodes go together and what they cost.

### Change first

- *photo* in Omini2 Demo Image
- *condition_scale* in Apply Omini2 LoRA: 0 shuts the edges out, 2 presses them on
- *reuse* in Condition Cache: *off* computes the condition at every step, *once* \
only at the first; compare the times

### For real pictures

Open the template **edges**: the same graph with FLUX.1-dev.
""",
        370,
    )
    models = demo_model(graph)
    shipped = graph.add("Omini2DemoImage", "coffee")
    photo = [shipped, square(graph, shipped, 256)]
    steps = edge_condition(graph, photo[-1], models.vae)
    lora = apply_lora(graph, models.model, steps[1], "omini2_demo_edges.safetensors")
    omini2 = [lora, cache(graph, lora)]
    text = prompt(graph, models.clip, "a red cup of coffee on a wooden table", 3.5)
    sampling = sample(graph, omini2[-1], text, models.vae, 256, 12)
    place(graph, notes, models, [(photo, steps)], omini2, text, sampling)
    return graph


def edge_guided() -> Graph:
    """FLUX.1-dev follows the edges of a photo."""
    graph = Graph("edges")
    change = """
- the picture in *Load Image* (any size)
- the prompt: say what the picture shows
- Canny's thresholds, until the edges are those that matter
- *refresh_every* in Condition Cache: lower is closer to no cache, higher is faster
"""
    notes = flux_dev_note(graph, {"canny.safetensors": "experimental"}, change)
    models = flux_dev(graph)
    photo = users_photo(graph, "Your picture")
    steps = edge_condition(graph, photo[-1], models.vae)
    lora = apply_lora(graph, models.model, steps[1], "canny.safetensors")
    omini2 = [lora, cache(graph, lora)]
    words = "a blue porcelain cup of hot chocolate on a white marble table, soft morning light"
    text = prompt(graph, models.clip, words, 3.5)
    sampling = sample(graph, omini2[-1], text, models.vae, 512, 28)
    place(graph, notes, models, [(photo, steps)], omini2, text, sampling)
    return graph


def subject() -> Graph:
    """FLUX.1-dev draws the thing on a photo somewhere else."""
    graph = Graph("subject")
    change = """
- the picture in *Load Image*: one thing, large, in the middle
- the prompt: call the thing *this item* and say where it is
- *image_guidance_scale*: FLUX.1-dev needs about 1.5; at 1 a step takes half \
the time, and the thing gets lost
"""
    notes = flux_dev_note(graph, {"subject_512.safetensors": "omini"}, change)
    models = flux_dev(graph)
    photo = users_photo(graph, "Your subject")
    encode = condition(graph, photo[-1], models.vae, "right")
    lora = apply_lora(graph, models.model, encode, "subject_512.safetensors")
    guided = graph.add("Omini2ImageGuidance", 1.5, model=lora)
    omini2 = [lora, guided, cache(graph, guided)]
    words = "On a rock by the sea at sunset stands this item, waves and spray behind it."
    text = prompt(graph, models.clip, words, 3.5)
    sampling = sample(graph, omini2[-1], text, models.vae, 512, 28)
    place(graph, notes, models, [(photo, [encode])], omini2, text, sampling)
    return graph


def two_conditions() -> Graph:
    """FLUX.1-dev puts a thing from one photo into the outlines of another."""
    graph = Graph("two-conditions")
    change = """
- both pictures: the first gives the outlines, the second the thing
- *condition_scale* of each *Apply Omini2 LoRA*: lower the one that has too much of a say
- *image_guidance_scale*: it strengthens both conditions
"""
    files = {"canny.safetensors": "experimental", "subject_512.safetensors": "omini"}
    notes = flux_dev_note(graph, files, change)
    models = flux_dev(graph)
    outlines = users_photo(graph, "Picture for the outlines")
    thing = users_photo(graph, "Your subject")
    shape = edge_condition(graph, outlines[-1], models.vae)
    look = condition(graph, thing[-1], models.vae, "right")
    first = apply_lora(graph, models.model, shape[1], "canny.safetensors")
    second = apply_lora(graph, first, look, "subject_512.safetensors")
    guided = graph.add("Omini2ImageGuidance", 1.5, model=second)
    omini2 = [first, second, guided, cache(graph, guided)]
    words = "A porcelain cup painted with this item, on a wooden table."
    text = prompt(graph, models.clip, words, 3.5)
    sampling = sample(graph, omini2[-1], text, models.vae, 512, 28)
    lanes = [(outlines, shape), (thing, [look])]
    place(graph, notes, models, lanes, omini2, text, sampling)
    return graph


WORKFLOWS: list[Callable[[], Graph]] = [try_it, edge_guided, subject, two_conditions]


def make_all() -> dict[str, str]:
    """File name -> content, for every workflow."""
    graphs = [build() for build in WORKFLOWS]
    return {f"{graph.name}.json": graph.as_json() for graph in graphs}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, content in make_all().items():
        (FOLDER / name).write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

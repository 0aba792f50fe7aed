"""Example workflows for editing models: what an edit changes is computed, the rest is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dev.workflows.files import QWEN_EDIT, QWEN_VAE, QWEN_VL
from dev.workflows.graph import FILES, MESSAGES, PREVIEW, Graph, Node, Socket
from dev.workflows.parts import WIDE, Models, kontext, no_negative, note

NOTES, PICTURES, MODELS, OMINI2, SAMPLING, RESULT = range(6)  # columns

NEEDED = f"""
### Files

{FILES}
"""
CHANGE = """
### Change first

- the picture in *Load Image* and the prompt: say what to change and what to keep
- *threshold* in Omini2 Spot Edit: higher leaves more as it was, lower edits more. After the run \
the node shows what was edited, and how much of the model's work was saved
- *reset_steps*: *none* is faster, with a little less care

Edits of the whole picture (its style, its light) save nothing. *Report* says how far the picture \
has moved; the result has the reference's own pixels wherever nothing was changed.
"""
MASKED = """
### Change first

- the picture in *Load Image*; then right-click on it, **Open in MaskEditor**, and paint over what \
may change (without a mask the run stops and says so)
- the prompt: say what to change
- *grow* in Omini2 Spot Edit: more room around the mask; *feather* in Omini2 Keep Unchanged: how \
softly the edit ends

Only what is painted goes through the model, from the first step on.
"""


@dataclass
class Given:
    """The picture to edit.

    Attributes:
        nodes: those that give it.
    """

    image: Socket
    mask: Socket | None
    nodes: list[Node]


def qwen(graph: Graph) -> Models:
    """The stock loaders for Qwen-Image-Edit."""
    model = graph.add("UNETLoader", QWEN_EDIT.name, "default")
    shifted = graph.add("ModelSamplingAuraFlow", 3.0, model=model)
    clip = graph.add("CLIPLoader", QWEN_VL.name, "qwen_image", "default")
    vae = graph.add("VAELoader", QWEN_VAE.name)
    return Models(shifted.socket, clip.socket, vae.socket, [model, shifted, clip, vae])


def picture(graph: Graph, masked: bool) -> Given:
    """The user's picture at about a megapixel, with its mask if there is to be one."""
    title = "Your picture and mask" if masked else "Your picture"
    load = graph.add("LoadImage", "example.png", "image", title=title)
    if not masked:
        scaled = graph.add("FluxKontextImageScale", title="About a megapixel", image=load["IMAGE"])
        return Given(scaled.socket, None, [load, scaled])
    links = {"image": load["IMAGE"], "alpha": load["MASK"]}
    joined = graph.add("JoinImageWithAlpha", title="Keep them together", **links)
    scaled = graph.add("FluxKontextImageScale", title="About a megapixel", image=joined)
    split = graph.add("SplitImageWithAlpha", image=scaled)
    return Given(split["IMAGE"], split["MASK"], [load, joined, scaled, split])


def spot_edit(
    graph: Graph, models: Models, select: str, threshold: float, mask: Socket | None, grow: int = 0
) -> Node:
    """Omini2 Spot Edit with its defaults, but for what is named."""
    values = (select, threshold, 4, "auto", "off", grow)
    links = {"model": models.model} | ({} if mask is None else {"mask": mask})
    if select == "perceptual":
        links["vae"] = models.vae
    return graph.add("Omini2SpotEdit", *values, **links)


def finished(
    graph: Graph,
    notes: Node,
    models: Models,
    given: Given,
    spot: Node,
    latent: Node,
    text: list[Node],
    settings: tuple[int, float],
) -> Graph:
    """Sampler, decoder and proof behind it, and all in its place.

    Args:
        text: the nodes of the prompts; the last two are the positive and the negative one.
        settings: steps and cfg.
    """
    steps, cfg = settings
    values = (1, "fixed", steps, cfg, "euler", "simple", 1.0)
    prompts = {"positive": text[-2], "negative": text[-1]}
    sampler = graph.add("KSampler", *values, model=spot, **prompts, latent_image=latent)
    decoded = graph.add("VAEDecode", samples=sampler, vae=models.vae)
    links = {"image": decoded, "samples": sampler, "reference": given.image, "vae": models.vae}
    if given.mask is not None:
        links["mask"] = given.mask
    kept = graph.add("Omini2KeepUnchanged", 8, **links)
    report = graph.add("PreviewAny", title="Report", source=kept["report"])
    graph.stack(NOTES, 0, "", notes)
    below = graph.stack(PICTURES, 0, "1  Picture", *given.nodes)
    graph.stack(PICTURES, below, "3  Reference", latent)
    below = graph.stack(MODELS, 0, "2  Model", *models.nodes)
    graph.stack(MODELS, below, "4  Prompt", *text)
    graph.stack(OMINI2, 0, "5  What is edited", spot)
    graph.stack(SAMPLING, 0, "6  Sampling", sampler, room=PREVIEW)
    save = graph.add("SaveImage", f"omini2/{graph.name}", images=kept)
    graph.stack(RESULT, MESSAGES, "7  Result", decoded, save, kept, report, width=WIDE)
    return graph


def on_kontext(name: str, masked: bool, words: str) -> Graph:
    """An edit on FLUX.1 Kontext."""
    graph = Graph(name)
    notes = note(graph, "Read me", NEEDED + (MASKED if masked else CHANGE))
    models, given = kontext(graph), picture(graph, masked)
    latent = graph.add("VAEEncode", pixels=given.image, vae=models.vae)
    encode = graph.add("CLIPTextEncode", words, title="Prompt", clip=models.clip)
    reference = graph.add("ReferenceLatent", conditioning=encode, latent=latent)
    positive = graph.add("FluxGuidance", 2.5, conditioning=reference)
    negative = no_negative(graph, encode)
    select = "mask" if masked else "perceptual"
    spot = spot_edit(graph, models, select, 0.2, given.mask)
    text = [encode, reference, positive, negative]
    return finished(graph, notes, models, given, spot, latent, text, (28, 1.0))


def spot_edit_kontext() -> Graph:
    """FLUX.1 Kontext changes a thing and leaves the rest as it was."""
    words = "change the colour of the cup to blue, keep everything else as it is"
    return on_kontext("spot-edit-kontext", False, words)


def masked_edit() -> Graph:
    """FLUX.1 Kontext changes what a mask marks, and nothing else."""
    return on_kontext("masked-edit-kontext", True, "replace it by a vase with yellow tulips")


def spot_edit_qwen() -> Graph:
    """The same on Qwen-Image-Edit, with a negative prompt and guidance."""
    graph = Graph("spot-edit-qwen")
    notes = note(graph, "Read me", NEEDED + CHANGE)
    models, given = qwen(graph), picture(graph, False)
    latent = graph.add("VAEEncode", pixels=given.image, vae=models.vae)
    text: list[Node] = []
    prompts = [("Prompt", "change the colour of the cup to blue"), ("No negative prompt", "")]
    for title, words in prompts:
        links = {"clip": models.clip, "image": given.image}
        text.append(graph.add("TextEncodeQwenImageEdit", words, title=title, **links))
    text += [graph.add("ReferenceLatent", conditioning=each, latent=latent) for each in text]
    spot = spot_edit(graph, models, "perceptual", 0.15, None)
    return finished(graph, notes, models, given, spot, latent, text, (20, 2.5))


EDITING: list[Callable[[], Graph]] = [spot_edit_kontext, spot_edit_qwen, masked_edit]

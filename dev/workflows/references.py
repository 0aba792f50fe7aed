"""Example workflows for editing models, whose reference images Condition Cache keeps.

No LoRA of ours: stock loaders, stock nodes for references or ours, and Condition Cache before the
sampler.
"""

from __future__ import annotations

from collections.abc import Callable

from dev.workflows.files import (
    FLUX2_VAE,
    KLEIN_4B,
    KLEIN_9B_KV,
    KREA2,
    KREA2_LORA,
    QWEN3_4B,
    QWEN3_8B,
    QWEN3_VL,
    QWEN_EDIT_2511,
    QWEN_VAE,
    QWEN_VL,
    ModelFile,
)
from dev.workflows.graph import FILES, MESSAGES, PREVIEW, Graph, Node
from dev.workflows.parts import (
    WIDE,
    Models,
    cache,
    kontext,
    load_lora,
    no_negative,
    note,
    numbered,
    sample,
    sample_latent,
)

NOTES, PICTURES, MODELS, PROMPT, SAMPLING, RESULT = range(6)  # columns
MEGAPIXEL = 1024  # pixels on the side of a square

NOTE = f"""
### Files

{FILES}

Needs ComfyUI {{host}} or newer.

### Change first

{{change}}

### What Condition Cache does here

{{cached}}
"""
JOINT = """
The model runs {what} beside the picture at every step, which then takes about {cost} as long. \
*Condition Cache* keeps the keys and values of that and computes them every *refresh_every* steps. \
The picture is close to the model's own, not the same; the node says after the run how far they \
had moved between two refreshes. *reuse* off is the model as it is, bit for bit.
"""


def read_me(graph: Graph, host: str, change: str, cached: str) -> Node:
    """Which files a graph needs and where they are, what to change first, what is reused."""
    parts = {"change": change.strip(), "cached": cached.strip()}
    return note(graph, "Read me", NOTE.format(host=host, **parts))


def loaders(graph: Graph, unet: ModelFile, clip: ModelFile, kind: str, vae: ModelFile) -> Models:
    """The stock loaders of a model with one text encoder."""
    model = graph.add("UNETLoader", unet.name, "default")
    text = graph.add("CLIPLoader", clip.name, kind, "default")
    decoder = graph.add("VAELoader", vae.name)
    return Models(model.socket, text.socket, decoder.socket, [model, text, decoder])


def picture(graph: Graph, title: str) -> list[Node]:
    """The user's picture at about a megapixel, in a shape that these models know."""
    load = graph.add("LoadImage", "example.png", "image", title=title)
    return [load, graph.add("FluxKontextImageScale", image=load["IMAGE"])]


def encoded(graph: Graph, models: Models, title: str) -> list[Node]:
    """The user's picture as a latent, the last node."""
    photo = picture(graph, title)
    return [*photo, graph.add("VAEEncode", pixels=photo[-1], vae=models.vae)]


def laid_out(
    graph: Graph,
    notes: Node,
    pictures: list[list[Node]],
    models: list[Node],
    kept: Node,
    prompt: list[Node],
    sampling: list[Node],
) -> Graph:
    """All in its place, from left to right, and the picture at the end.

    Args:
        sampling: its last node gives the decoded picture.
    """
    graph.stack(NOTES, 0, "", notes)
    below = 0
    for number, photo in enumerate(pictures, 1):
        below = graph.stack(PICTURES, below, numbered(1, "picture", number, pictures), *photo)
    graph.stack(MODELS, 0, "2  Model", *models)
    below = graph.stack(PROMPT, 0, "3  Prompt, references", *prompt)
    graph.stack(PROMPT, below, "4  Omini2", kept)
    graph.stack(SAMPLING, 0, "5  Sampling", *sampling[:-1], room=PREVIEW)
    save = graph.add("SaveImage", f"omini2/{graph.name}", images=sampling[-1])
    graph.stack(RESULT, MESSAGES, "6  Result", sampling[-1], save, width=WIDE)
    return graph


def kontext_edit() -> Graph:
    """FLUX.1 Kontext changes a picture as the prompt says."""
    graph = Graph("kontext-edit")
    change = """
- the picture in *Load Image*, of any size and shape
- the prompt: say what shall change, and what shall stay
- *refresh_every* in Condition Cache: lower is closer to the model's own picture, higher is \
faster; *reuse* once is the fastest
"""
    cached = JOINT.format(what="the reference", cost="twice")
    notes = read_me(graph, "0.3.76", change, cached)
    models = kontext(graph)
    photo = encoded(graph, models, "Your picture")
    words = "Change the background to a snowy forest, keep everything else exactly as it is."
    encode = graph.add("CLIPTextEncode", words, title="Prompt", clip=models.clip)
    referring = graph.add("ReferenceLatent", conditioning=encode, latent=photo[-1])
    positive = graph.add("FluxGuidance", 2.5, conditioning=referring)
    prompt = [encode, referring, positive, no_negative(graph, positive)]
    kept = cache(graph, models.nodes[0])
    # At denoise 1 only the size of this latent counts.
    sampling = sample_latent(graph, kept, prompt, models.vae, photo[-1], 20)[1:]
    return laid_out(graph, notes, [photo], models.nodes, kept, prompt, sampling)


def compact() -> Graph:
    """FLUX.1 Kontext with a reference of a quarter of the tokens."""
    graph = Graph("kontext-compact-reference")
    change = """
- the picture in *Load Image*: *fit* picture scales it and crops it around its centre
- the prompt: say what shall change, and what shall stay
- *compression* in Omini2 Reference: 1 is the model as it is, 0.5 a quarter of the tokens; FLUX.1 \
Kontext was not trained on it, so compare
- *strength*: how much of the picture is kept; *mask*: which part of it the model gets to see
- the size in the empty latent
"""
    cached = """
At half the side the reference has a quarter of the tokens, and a step takes about 1.1 times as \
long as without one instead of 1.9 times, as counted. *Condition Cache* computes what is left only \
every *refresh_every* steps. Both change the picture a little; *compression* 1 and *reuse* off are \
the model as it is, bit for bit.
"""
    notes = read_me(graph, "0.3.76", change, cached)
    models = kontext(graph)
    photo = graph.add("LoadImage", "example.png", "image", title="Your picture")
    words = "Change the background to a snowy forest, keep everything else exactly as it is."
    encode = graph.add("CLIPTextEncode", words, title="Prompt", clip=models.clip)
    guided = graph.add("FluxGuidance", 2.5, conditioning=encode)
    empty = graph.add("EmptySD3LatentImage", MEGAPIXEL, MEGAPIXEL, 1)
    settings = (0.5, True, 1.0, 0.0, 1.0, "picture")
    links = {"model": models.model, "positive": guided, "vae": models.vae, "latent": empty}
    reference = graph.add("Omini2Reference", *settings, image=photo["IMAGE"], **links)
    kept = cache(graph, reference["model"])
    text = [reference["positive"], reference["negative"]]
    sampling = sample_latent(graph, kept, text, models.vae, empty, 20)
    prompt = [encode, guided, reference]
    return laid_out(graph, notes, [[photo]], models.nodes, kept, prompt, sampling)


def sample_flux2(
    graph: Graph, model: Node, prompt: list[Node], models: Models, latent: Node, steps: int
) -> list[Node]:
    """A distilled FLUX.2's sampling, whose schedule goes by the picture's size."""
    guider = graph.add("CFGGuider", 1.0, model=model, positive=prompt[-2], negative=prompt[-1])
    parts = {
        "noise": graph.add("RandomNoise", 1, "fixed"),
        "guider": guider,
        "sampler": graph.add("KSamplerSelect", "euler"),
        "sigmas": graph.add("Flux2Scheduler", steps, MEGAPIXEL, MEGAPIXEL),
    }
    # At the first noise level only the size of this latent counts.
    sampler = graph.add("SamplerCustomAdvanced", **parts, latent_image=latent)
    decoded = graph.add("VAEDecode", samples=sampler, vae=models.vae)
    return [*parts.values(), sampler, decoded]


def flux2(
    graph: Graph,
    files: list[ModelFile],
    change: str,
    cached: str,
    words: str,
    many: int,
    references: str,
) -> Graph:
    """FLUX.2 klein with so many pictures."""
    unet, clip, vae = files
    notes = read_me(graph, "0.9.2", change, cached)
    models = loaders(graph, unet, clip, "flux2", vae)
    titles = ["Your picture", "Second picture"][:many]
    pictures = [encoded(graph, models, title) for title in titles]
    prompt = [graph.add("CLIPTextEncode", words, title="Prompt", clip=models.clip)]
    for photo in pictures:
        links = {"conditioning": prompt[-1], "latent": photo[-1]}
        prompt.append(graph.add("ReferenceLatent", **links))
    prompt.append(no_negative(graph, prompt[-1]))
    kept = cache(graph, models.nodes[0], references)
    sampling = sample_flux2(graph, kept, prompt, models, pictures[0][-1], 4)
    return laid_out(graph, notes, pictures, models.nodes, kept, prompt, sampling)


def klein_two() -> Graph:
    """FLUX.2 klein 4B puts what is on two pictures into one."""
    change = """
- both pictures; the new one gets the shape of the first
- the prompt: call them *image 1* and *image 2*
- a third picture: one more *Load Image*, *FluxKontextImageScale*, *VAE Encode* and \
*ReferenceLatent*, between the last one and *No negative prompt*
- klein 9B: its file, and *qwen_3_8b_fp8mixed.safetensors* as the text encoder
"""
    cached = JOINT.format(what="both references", cost="three times") + (
        "\nWith 4 steps that is once, at the first: *refresh_every* 2 refreshes in the middle.\n"
    )
    graph = Graph("flux2-klein-two-references")
    files = [KLEIN_4B, QWEN3_4B, FLUX2_VAE]
    words = "The thing from image 1 stands in the scene of image 2, in the same light."
    return flux2(graph, files, change, cached, words, 2, "auto")


def klein_kv() -> Graph:
    """FLUX.2 klein-9b-kv, which was trained so that references can be computed once."""
    change = """
- the picture in *Load Image*
- the prompt: say what shall change
- the seed: another one computes no reference at all
- more pictures: one more *Load Image*, *FluxKontextImageScale*, *VAE Encode* and \
*ReferenceLatent* each, between the last one and *No negative prompt*
"""
    cached = """
This model was trained with references that look at each other only, at time 0: their keys and \
values are the same at every step, so *references* isolated computes them once and is exact. \
They are kept for the next seed and the next prompt too.

Don't use isolated with klein 4B or 9B: those were trained otherwise. Take *Flux KV Cache* out of \
your graph if it is in there: it computes the references in another way than this model was \
trained with.
"""
    graph = Graph("flux2-klein-9b-kv")
    files = [KLEIN_9B_KV, QWEN3_8B, FLUX2_VAE]
    words = "Change the background to a snowy forest, keep everything else exactly as it is."
    return flux2(graph, files, change, cached, words, 1, "isolated")


def qwen() -> Graph:
    """Qwen-Image-Edit-2511 changes a picture as the prompt says."""
    graph = Graph("qwen-image-edit-2511")
    change = """
- the picture in *Load Image*; a second and a third go into *image2* and *image3* of both \
*TextEncodeQwenImageEditPlus*
- the prompt: call them *image 1*, *image 2*
- *steps* 40 for the most careful picture; with the LoRA \
*Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16* (Load LoRA, before *ModelSamplingAuraFlow*) \
4 steps at *cfg* 1
- *refresh_every* in Condition Cache: lower is closer to the model's own picture, higher is faster
"""
    cached = JOINT.format(what="the reference", cost="twice") + (
        "\nAt *cfg* 4 both prompts have the reference, so keys and values are kept twice: 6.0 GB. "
        "*storage* fp8 halves that.\n"
    )
    notes = read_me(graph, "0.5", change, cached)
    models = loaders(graph, QWEN_EDIT_2511, QWEN_VL, "qwen_image", QWEN_VAE)
    photo = encoded(graph, models, "Your picture")
    links = {"clip": models.clip, "vae": models.vae, "image1": photo[1]}
    words = "Change the background to a snowy forest, keep everything else exactly as it is."
    kind = "TextEncodeQwenImageEditPlus"
    prompt = [
        graph.add(kind, words, title="Prompt", **links),
        graph.add(kind, "", title="Negative prompt", **links),
    ]
    shifted = graph.add("ModelSamplingAuraFlow", 3.1, model=models.model)
    normed = graph.add("CFGNorm", 1.0, model=shifted)
    kept = cache(graph, normed)
    sampling = sample_latent(graph, kept, prompt, models.vae, photo[-1], 20, cfg=4.0)[1:]
    unet, *others = models.nodes
    model_nodes = [unet, shifted, normed, *others]
    return laid_out(graph, notes, [photo], model_nodes, kept, prompt, sampling)


def krea2() -> Graph:
    """Krea 2 with a LoRA that lets it see a picture."""
    graph = Graph("krea2-edit-lora")
    change = """
- the picture in *Load Image*; with this LoRA it gives the style
- the prompt: what shall be drawn
- the LoRA: any that ai-toolkit has trained on Krea 2 with reference images. Its presets do so \
with *kv_cache: true*; set *references* to **isolated** for such a file, if the node doesn't find \
that out by itself
- *width* and *height*, in *EmptySD3LatentImage* and in *ModelSamplingFlux*
"""
    cached = """
*auto* reads the LoRA's file: where it says *kv_cache*, references look at each other only, at \
time 0, and are computed once; that is exact for such a LoRA. Else they are joint, and computed \
every *refresh_every* steps. The node shows which after the run.

Krea 2 sees no reference without *Edit Model Reference Method*.
"""
    notes = read_me(graph, "0.33", change, cached)
    models = loaders(graph, KREA2, QWEN3_VL, "krea2", QWEN_VAE)
    unet, clip, vae = models.nodes
    lora = load_lora(graph, models.model, KREA2_LORA.name, 1.0)
    photo = picture(graph, "Your picture")
    links = {"clip": models.clip, "vae": models.vae, "image1": photo[-1]}
    words = "a lighthouse on a cliff above a stormy sea"
    encode = graph.add("TextEncodeQwenImageEditPlus", words, title="Prompt", **links)
    placed = graph.add(
        "FluxKontextMultiReferenceLatentMethod", "index_timestep_zero", conditioning=encode
    )
    prompt = [encode, placed, no_negative(graph, placed)]
    values = (1.15, 0.5, MEGAPIXEL, MEGAPIXEL)
    shifted = graph.add("ModelSamplingFlux", *values, model=lora)
    kept = cache(graph, shifted)
    sampling = sample(graph, kept, prompt, models.vae, MEGAPIXEL, 8)
    model_nodes = [unet, lora, shifted, clip, vae]
    return laid_out(graph, notes, [photo], model_nodes, kept, prompt, sampling)


REFERENCES: list[Callable[[], Graph]] = [kontext_edit, compact, klein_two, klein_kv, qwen, krea2]

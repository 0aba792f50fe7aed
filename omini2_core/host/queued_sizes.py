"""Sizes in a queued prompt, as far as its constants say: of images, conditions and pictures.

Whatever isn't known for certain is None, and left to the run: nothing is refused that would run.
Heights come before widths.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import folder_paths
import node_helpers
from PIL import Image

from ..errors import Omini2Error
from ..tokens.compact import compressed
from ..tokens.condition import TOKEN_PIXELS
from . import queued
from .queued import Node
from .queued_samplers import samplers_of

Size = tuple[int, int]
LATENT_PIXELS = 8  # of the picture, along a latent pixel's side, in FLUX.1's VAE
EMPTY = ("EmptyLatentImage", "EmptySD3LatentImage")
# Give on what comes in at an input of this name, as large as it was.
SAME_SIZE = {"Canny": "image", "ImageBlur": "image", "ImageInvert": "image"}
SAME_LATENT = {"SetLatentNoiseMask": "samples", "RepeatLatentBatch": "samples"}
# Give on a prompt with the references that it has.
SAME_PROMPT = {"FluxGuidance", "FluxKontextMultiReferenceLatentMethod"}
TEXT = {"CLIPTextEncode", "CLIPTextEncodeFlux"}
DEMO_IMAGE = (512, 512)
MIRRORED_OR_TURNED = range(2, 9)  # Exif's orientations that not every host heeds
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class _Latent:
    """The size in pixels of the picture that a latent stands for, and whether a VAE has made it.

    Of empty ones FLUX.1's is said.
    """

    size: Size
    by_vae: bool


def condition_hw(node: Node, name: str = "condition") -> Size | None:
    """Rows and columns of tokens of the condition at a node's input."""
    found = node.source(name)
    if found is None:
        return None
    source, _ = found
    if source.kind == "Omini2CompactTokens":
        return _compact_hw(source)
    size = _encoded(source)
    return None if size is None else (size[0] // TOKEN_PIXELS, size[1] // TOKEN_PIXELS)


def pictures_with_condition(node: Node) -> Iterator[Size]:
    """Sizes in latent pixels of what will be sampled with the condition that a node gives."""
    for reader in node.readers("condition"):
        if reader.kind == "Omini2CompactTokens":
            yield from pictures_with_condition(reader)
        elif reader.kind == "Omini2ApplyLoRA":
            yield from pictures_with_model(reader)


def pictures_with_model(node: Node) -> Iterator[Size]:
    """Sizes in latent pixels of what will be sampled with the model that a node gives."""
    for sampler in samplers_of(node):
        picture = _latent(sampler, "latent_image")
        if picture is not None:
            height, width = picture.size
            yield height // LATENT_PIXELS, width // LATENT_PIXELS


def pictures_with_reference(node: Node) -> Iterator[tuple[Size, Size]]:
    """Sizes in pixels of first references, and of pictures sampled with the model a node gives."""
    for sampler in samplers_of(node):
        text, reference = _prompt_of(sampler)
        picture = _latent(sampler, "latent_image")
        if text is None or reference is None or picture is None:
            continue
        # Of some models a latent pixel is twice as large: only a VAE knows, or FLUX.1's encoders.
        comparable = (reference.by_vae and picture.by_vae) or _is_flux1(text)
        sides = *reference.size, *picture.size
        if comparable and not any(side % TOKEN_PIXELS for side in sides):
            yield reference.size, picture.size


def _compact_hw(node: Node) -> Size | None:
    hw, share = condition_hw(node), node.constant("compression")
    try:
        return None if hw is None or share is None else compressed(hw, share)
    except Omini2Error:  # said at that node
        return None


def _encoded(node: Node) -> Size | None:
    """The size of a condition in pixels, before Compact Tokens."""
    if node.kind != "Omini2ConditionEncode":
        return None
    if node.inputs.get("resize", "off") == "off":
        size = _image(node, "image")
    elif (side := node.constant("size")) is None:
        return None
    else:
        size = int(side), int(side)
    return None if size is None else (_whole(size[0], TOKEN_PIXELS), _whole(size[1], TOKEN_PIXELS))


def _whole(side: int, unit: int) -> int:
    return side // unit * unit


def _image(node: Node, name: str) -> Size | None:
    """The size in pixels of the image at a node's input."""
    found = node.source(name)
    if found is None:
        return None
    source, output = found
    if source.kind in SAME_SIZE:
        return _image(source, SAME_SIZE[source.kind])
    if source.kind == "Omini2ConditionEncode":
        return _encoded(source)
    if source.kind == "Omini2DemoImage":
        return DEMO_IMAGE
    if source.kind == "LoadImage":
        return _file(source.inputs.get("image"))
    if source.kind == "ImagePadForOutpaint" and output == 0:
        return _padded(source)
    if source.kind == "FluxKontextImageScale":
        return _kontext(source)
    if source.kind in ("ImageScale", "EmptyImage"):
        return _set(source)
    return None


def _set(node: Node) -> Size | None:
    height, width = node.constant("height"), node.constant("width")
    # With 0 the other side says it.
    return (int(height), int(width)) if height and width else None


def _padded(node: Node) -> Size | None:
    size = _image(node, "image")
    around = [node.constant(side) for side in ("top", "bottom", "left", "right")]
    if size is None or None in around:
        return None
    top, bottom, left, right = (int(side or 0) for side in around)
    return size[0] + top + bottom, size[1] + left + right


def _kontext(node: Node) -> Size | None:
    """Of the host's sizes the one that is nearest in shape, as that node chooses it."""
    size = _image(node, "image")
    module = sys.modules.get(getattr(node.host_class, "__module__", ""))
    # The list was renamed.
    named = (getattr(module, f"PREF{r}ED_KONTEXT_RESOLUTIONS", ()) for r in ("ER", "ERR"))
    sizes = next(filter(None, named), None)
    if size is None or sizes is None:
        return None
    shape = size[1] / size[0]
    _, width, height = min((abs(shape - w / h), w, h) for w, h in sizes)
    return height, width


def _file(name: object) -> Size | None:
    if not isinstance(name, str) or not folder_paths.exists_annotated_filepath(name):
        return None
    try:
        path = folder_paths.get_annotated_filepath(name)
        with node_helpers.pillow(Image.open, path) as image:
            turned = image.getexif().get(EXIF_ORIENTATION) in MIRRORED_OR_TURNED
            return None if turned else (image.height, image.width)
    except (OSError, ValueError, SyntaxError):  # loading says what is wrong with it
        return None


def _latent(node: Node, name: str) -> "_Latent | None":
    """The latent at a node's input."""
    found = node.source(name)
    if found is None:
        return None
    source, _ = found
    if source.kind in SAME_LATENT:
        return _latent(source, SAME_LATENT[source.kind])
    by_vae = source.kind == "VAEEncode"
    size = None
    if by_vae:
        size = _image(source, "pixels")
    elif source.kind in EMPTY:
        size = _set(source)
    return None if size is None else _Latent(size, by_vae)


def _prompt_of(sampler: Node) -> "tuple[Node | None, _Latent | None]":
    """Where a sampler's positive prompt begins, and its first reference."""
    guider = sampler.source("guider")
    node, reference = (guider[0] if guider else sampler), None
    for _ in queued.nodes():  # no prompt is longer
        found = node.source("positive") or node.source("conditioning")
        if found is None:
            return None, None
        node, _ = found
        if node.kind in TEXT:
            return node, reference
        if node.kind == "ReferenceLatent" and "latent" in node.inputs:
            reference = _latent(node, "latent")
        elif node.kind not in SAME_PROMPT:
            break
    return None, None


def _is_flux1(text: Node) -> bool:
    """Whether a prompt is made by FLUX.1's text encoders, which go with no other model."""
    loader = text.source("clip")
    return loader is not None and loader[0].inputs.get("type") == "flux"

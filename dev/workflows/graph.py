"""Graph files of ComfyUI's editor, written from Python: nodes, links, groups, places.

Knows which sockets and widgets the nodes have, so that a workflow reads as what it does; a test
compares this with what the host says about its nodes.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

from dev.workflows.files import BY_NAME

# Pixels. Enough for a node as the editor draws it on its canvas (a widget is 24 high) and as HTML.
TITLE, SLOT, WIDGET, GAP, GUTTER = 30, 20, 27, 28, 32
GROUP_TOP, GROUP_SIDE = 46, 12
COLUMN = 280
LINE, LETTER = 19, 6.4  # of a note's text, where nodes are drawn as HTML
# Where a graph's upper left corner comes to lie: clear of the editor's own bars, and the whole of
# most graphs on a screen of 1920x1080.
SCALE, CORNER = 0.75, (80, 100)  # pixels
PREVIEW = 200  # pixels by which a sampler grows while it shows what it draws
MESSAGES = 160  # below them, in the upper right corner, the result isn't hidden
EDITORS_OWN = "MarkdownNote", "Reroute"  # nodes that the host doesn't know
FILES = "<files>"  # in a note: the files that the graph names, with links
BADGE = 32  # newer editors write below a node which extension it is from
MODEL_COLOURS = {"color": "#223", "bgcolor": "#335"}  # not red, in which the editor has errors
TEXT_COLOURS = {"color": "#232", "bgcolor": "#353"}
NOTE_COLOURS = {"color": "#432", "bgcolor": "#653"}


@dataclass(frozen=True)
class Spec:
    """What a kind of node has: sockets by name and type, widgets by name in the editor's order.

    Attributes:
        extra: pixels beyond sockets and one-line widgets: a text field, a picture.
        room: pixels left free below, for what the node shows after a run.
    """

    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    widgets: tuple[str, ...] = ()
    extra: int = 0
    room: int = 0
    look: dict[str, str] = field(default_factory=dict)

    @property
    def height(self) -> int:
        """What the node needs below its title."""
        slots = max(len(self.inputs), len(self.outputs))
        return slots * SLOT + len(self.widgets) * WIDGET + self.extra + 12


def _spec(inputs: str = "", outputs: str = "", widgets: str = "", **rest: Any) -> Spec:
    """A kind of node in short: sockets as ``name:TYPE``, or as ``TYPE`` where that is the name."""
    ins, outs = (
        dict((each.split(":") if ":" in each else (each, each)) for each in sockets.split())
        for sockets in (inputs, outputs)
    )
    return Spec(ins, outs, tuple(widgets.split()), **rest)


SPECS: dict[str, Spec] = {
    "MarkdownNote": _spec("", "", "text", extra=260, look=NOTE_COLOURS),
    "Reroute": _spec("value:*", "value:VAE"),  # as the only one that is needed
    # loaders
    "UNETLoader": _spec("", "MODEL", "unet_name weight_dtype", look=MODEL_COLOURS),
    "CheckpointLoaderSimple": _spec("", "MODEL CLIP VAE", "ckpt_name", look=MODEL_COLOURS),
    "DualCLIPLoader": _spec("", "CLIP", "clip_name1 clip_name2 type device", look=MODEL_COLOURS),
    "CLIPLoader": _spec("", "CLIP", "clip_name type device", look=MODEL_COLOURS),
    "LoraLoaderModelOnly": _spec(
        "model:MODEL", "MODEL", "lora_name strength_model", room=12, look=MODEL_COLOURS
    ),
    "VAELoader": _spec("", "VAE", "vae_name", look=MODEL_COLOURS),
    "Omini2DemoModel": _spec("", "model:MODEL clip:CLIP vae:VAE", look=MODEL_COLOURS),
    # pictures
    "LoadImage": _spec("", "IMAGE MASK", "image upload", extra=310),
    "Omini2DemoImage": _spec("", "image:IMAGE", "photo"),
    "ImageScale": _spec("image:IMAGE", "IMAGE", "upscale_method width height crop"),
    "ImageScaleToMaxDimension": _spec("image:IMAGE", "IMAGE", "upscale_method largest_size"),
    "FluxKontextImageScale": _spec("image:IMAGE", "IMAGE"),
    "ImageStitch": _spec(
        "image1:IMAGE image2:IMAGE",
        "IMAGE",
        "direction match_image_size spacing_width spacing_color",
    ),
    "Canny": _spec("image:IMAGE", "IMAGE", "low_threshold high_threshold"),
    "ImagePadForOutpaint": _spec("image:IMAGE", "IMAGE MASK", "left top right bottom feathering"),
    "ImageCompositeMasked": _spec(
        "destination:IMAGE source:IMAGE mask:MASK", "IMAGE", "x y resize_source"
    ),
    "ImageBlur": _spec("image:IMAGE", "IMAGE", "blur_radius sigma"),
    "ImageRGBToYUV": _spec("image:IMAGE", "Y:IMAGE U:IMAGE V:IMAGE"),
    "JoinImageWithAlpha": _spec("image:IMAGE alpha:MASK", "IMAGE"),
    "SplitImageWithAlpha": _spec("image:IMAGE", "IMAGE MASK"),
    # masks
    "SolidMask": _spec("", "MASK", "value width height"),
    "MaskComposite": _spec("destination:MASK source:MASK", "MASK", "x y operation"),
    "GrowMask": _spec("mask:MASK", "MASK", "expand tapered_corners"),
    "MaskToImage": _spec("mask:MASK", "IMAGE"),
    "ImageToMask": _spec("image:IMAGE", "MASK", "channel"),
    "PreviewImage": _spec("images:IMAGE", "", extra=320, room=24),
    "SaveImage": _spec("images:IMAGE", "", "filename_prefix", extra=400),
    # text
    "CLIPTextEncode": _spec("clip:CLIP", "CONDITIONING", "text", extra=90, look=TEXT_COLOURS),
    "FluxGuidance": _spec("conditioning:CONDITIONING", "CONDITIONING", "guidance"),
    "ConditioningZeroOut": _spec("conditioning:CONDITIONING", "CONDITIONING"),
    # references
    "ReferenceLatent": _spec("conditioning:CONDITIONING latent:LATENT", "CONDITIONING"),
    "FluxKontextMultiReferenceLatentMethod": _spec(
        "conditioning:CONDITIONING", "CONDITIONING", "reference_latents_method", extra=20
    ),
    "TextEncodeQwenImageEditPlus": _spec(
        "clip:CLIP vae:VAE image1:IMAGE image2:IMAGE image3:IMAGE",
        "CONDITIONING",
        "prompt",
        extra=90,
        look=TEXT_COLOURS,
    ),
    "TextEncodeQwenImageEdit": _spec(
        "clip:CLIP vae:VAE image:IMAGE", "CONDITIONING", "prompt", extra=90, look=TEXT_COLOURS
    ),
    "Omini2Reference": _spec(
        "model:MODEL positive:CONDITIONING vae:VAE image:IMAGE negative:CONDITIONING mask:MASK "
        "latent:LATENT",
        "model:MODEL positive:CONDITIONING negative:CONDITIONING",
        "compression position_correcting strength start_percent end_percent fit",
    ),
    # conditions
    "Omini2ConditionEncode": _spec(
        "image:IMAGE vae:VAE mask:MASK",
        "condition:OMINI2_CONDITION image:IMAGE",
        "placement delta_rows delta_cols position_scale resize size",
    ),
    "Omini2CompactTokens": _spec(
        "condition:OMINI2_CONDITION mask:MASK",
        "condition:OMINI2_CONDITION tokens:IMAGE count:INT",
        "compression position_correcting prune threshold grow token_integration shift_schedule",
        room=190,
    ),
    "Omini2ApplyLoRA": _spec(
        "model:MODEL condition:OMINI2_CONDITION",
        "model:MODEL",
        "lora_name strength condition_scale attention start_percent end_percent family",
        room=170,
    ),
    "Omini2ConditionCache": _spec(
        "model:MODEL", "model:MODEL", "reuse refresh_every storage keep_on references", room=90
    ),
    "Omini2ImageGuidance": _spec("model:MODEL", "model:MODEL", "image_guidance_scale"),
    "Omini2SaveCache": _spec(
        "model:MODEL positive:CONDITIONING latent_image:LATENT",
        "",
        "filename_prefix description",
        extra=60,
    ),
    "Omini2LoadCache": _spec(
        "model:MODEL",
        "model:MODEL description:STRING",
        "cache_name condition_scale start_percent end_percent",
    ),
    "Omini2TrainLoRA": _spec(
        "clip:CLIP vae:VAE",
        "lora_name:STRING loss_curve:IMAGE lora:COMBO",
        "base images condition condition_folder attention size compression delta_rows delta_cols "
        "steps batch_size rank optimizer learning_rate quantize checkpoint_every seed "
        "control_after_generate lora_name resume sample_every references",
        room=160,
        look={"showAdvanced": False},
    ),
    # edits
    "Omini2SpotEdit": _spec(
        "model:MODEL vae:VAE mask:MASK",
        "model:MODEL",
        "select threshold full_steps reset_steps fusion grow",
        room=200,
    ),
    "Omini2KeepUnchanged": _spec(
        "image:IMAGE samples:LATENT reference:IMAGE vae:VAE mask:MASK",
        "image:IMAGE mask:MASK report:STRING",
        "feather",
    ),
    "PreviewAny": _spec("source:*", "", "", extra=120),
    # sampling
    "ModelSamplingAuraFlow": _spec("model:MODEL", "MODEL", "shift"),
    "ModelSamplingFlux": _spec("model:MODEL", "MODEL", "max_shift base_shift width height"),
    "CFGNorm": _spec("model:MODEL", "MODEL", "strength", extra=WIDGET + 20),  # newer: two
    "CFGGuider": _spec("model:MODEL positive:CONDITIONING negative:CONDITIONING", "GUIDER", "cfg"),
    "KSamplerSelect": _spec("", "SAMPLER", "sampler_name"),
    "RandomNoise": _spec("", "NOISE", "noise_seed control_after_generate"),
    "Flux2Scheduler": _spec("", "SIGMAS", "steps width height"),
    "SamplerCustomAdvanced": _spec(
        "noise:NOISE guider:GUIDER sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT",
        "output:LATENT denoised_output:LATENT",
    ),
    "EmptySD3LatentImage": _spec("", "LATENT", "width height batch_size"),
    "KSampler": _spec(
        "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT",
        "LATENT",
        "seed control_after_generate steps cfg sampler_name scheduler denoise",
    ),
    "VAEEncode": _spec("pixels:IMAGE vae:VAE", "LATENT"),
    "VAEDecode": _spec("samples:LATENT vae:VAE", "IMAGE"),
}


@dataclass
class Node:
    """A node in a graph; its output sockets are ``node["NAME"]``."""

    id: int
    kind: str
    title: str
    values: list[Any]
    links: dict[str, int] = field(default_factory=dict)
    used_by: dict[str, list[int]] = field(default_factory=dict)
    x: int = 0
    y: int = 0
    width: int = COLUMN
    height: int = 0

    def __getitem__(self, output: str) -> Socket:
        if output not in SPECS[self.kind].outputs:
            raise KeyError(f"{self.kind} has no output {output}")
        return Socket(self, output)

    @property
    def socket(self) -> Socket:
        """The first output."""
        return self[next(iter(SPECS[self.kind].outputs))]

    def as_dict(self, order: int) -> dict[str, Any]:
        spec = SPECS[self.kind]

        def shown(socket: str) -> str:
            return "" if self.kind == "Reroute" else socket

        out = {
            "id": self.id,
            "type": self.kind,
            "pos": [self.x, self.y],
            "size": [self.width, self.height],
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": [
                {"name": shown(name), "type": kind, "link": self.links.get(name)}
                for name, kind in spec.inputs.items()
            ]
            + [
                {"name": name, "type": "COMBO", "widget": {"name": name}, "link": link}
                for name, link in self.links.items()
                if name in spec.widgets
            ],
            "outputs": [
                {"name": shown(name), "type": kind, "links": self.used_by.get(name, [])}
                for name, kind in spec.outputs.items()
            ],
            "properties": self._properties(),
            "widgets_values": self.values,
            **spec.look,
        }
        return {**out, "title": self.title} if self.title else out

    def _properties(self) -> dict[str, Any]:
        """Which package the node is from, for when it is missing, and where its files are."""
        if self.kind in EDITORS_OWN:
            return {}
        ours = self.kind.startswith("Omini2")
        out: dict[str, Any] = {
            "cnr_id": "comfyui-omini2" if ours else "comfy-core",
            "Node name for S&R": self.kind,
        }
        named = [BY_NAME[value] for value in self.values if value in BY_NAME]
        if found := [file for file in named if file.url]:
            out["models"] = [
                {"name": file.name, "url": file.url, "directory": file.folder} for file in found
            ]
        return out


@dataclass(frozen=True)
class Socket:
    """One output of a node."""

    node: Node
    output: str

    @property
    def kind(self) -> str:
        """The type of what comes out."""
        return SPECS[self.node.kind].outputs[self.output]


def _lines(text: str, width: int) -> int:
    """How many lines a note's text takes, headings and the gaps between paragraphs included."""
    count = 0.0
    for line in text.splitlines():
        seen = re.sub(r"\]\([^)]*\)", "", line)
        count += max(math.ceil(len(seen) * LETTER / (width - 40)), 1)
        count += 1.2 * line.startswith("#") + 0.4 * line.startswith("-")
    return math.ceil(count)


class Graph:
    """A workflow under construction.

    Attributes:
        scale: how large the editor draws it at first.
    """

    def __init__(self, name: str, scale: float = SCALE) -> None:
        self.name, self.scale = name, scale
        self.nodes: list[Node] = []
        self.links: list[list[Any]] = []
        self.groups: list[dict[str, Any]] = []

    def add(
        self,
        kind: str,
        *values: Any,
        title: str = "",
        extra: int = 0,
        **links: Node | Socket,
    ) -> Node:
        """A node with its widgets' values in the editor's order and what its inputs come from.

        Args:
            extra: more pixels of height than the kind of node usually gets.
        """
        spec = SPECS[kind]
        if len(values) != len(spec.widgets):
            raise ValueError(f"{kind} has the widgets {spec.widgets}, got {values}")
        height = spec.height + extra
        node = Node(len(self.nodes) + 1, kind, title, list(values), height=height)
        self.nodes.append(node)
        for name, source in links.items():
            self._link(source.socket if isinstance(source, Node) else source, node, name)
        return node

    def _link(self, source: Socket, target: Node, name: str) -> None:
        spec = SPECS[target.kind]
        inputs = spec.inputs | {
            name: "COMBO" for name in (*target.links, name) if name in spec.widgets
        }
        if inputs.get(name) not in (source.kind, "*"):
            raise ValueError(f"{source.kind} does not fit {target.kind}.{name}")
        link = len(self.links) + 1
        outputs = list(SPECS[source.node.kind].outputs)
        target.links[name] = link
        source.node.used_by.setdefault(source.output, []).append(link)
        self.links.append(
            [
                link,
                source.node.id,
                outputs.index(source.output),
                target.id,
                list(inputs).index(name),
                source.kind,
            ]
        )

    def stack(
        self, column: int, y: int, title: str, *nodes: Node, width: int = COLUMN, room: int = 0
    ) -> int:
        """Places nodes one below the other in a titled group (or none); returns where it ends.

        Args:
            column: which of the columns, each `COLUMN` wide, from the left.
            y: the group's upper edge.
            room: pixels left free below the last one.
        """
        x = column * (COLUMN + 2 * GROUP_SIDE + GUTTER)
        cursor = y + GROUP_TOP
        for node in nodes:
            if node.kind == "MarkdownNote":
                text = node.values[0] = node.values[0].replace(FILES, self._files())
                node.height = _lines(text, width) * LINE + 60
            node.x, node.y, node.width = x, cursor + TITLE, width
            badge = BADGE if node.kind.startswith("Omini2") else 0
            cursor = node.y + node.height + SPECS[node.kind].room + badge + GAP
        bottom = cursor - GAP + GROUP_SIDE + room
        if title:
            self.groups.append(
                {
                    "id": len(self.groups) + 1,
                    "title": title,
                    "bounding": [x - GROUP_SIDE, y, width + 2 * GROUP_SIDE, bottom - y],
                    "color": "#3f789e",
                    "font_size": 24,
                    "flags": {},
                }
            )
        return bottom + GAP

    def _files(self) -> str:
        """A line for each file that a node names, as far as it is known where to fetch it."""
        named = [value for node in self.nodes for value in node.values if value in BY_NAME]
        return "\n".join(f"- {BY_NAME[name].line}" for name in dict.fromkeys(named))

    def as_dict(self) -> dict[str, Any]:
        """The file's content, in the order and version that the editor saves."""
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-omini2/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": [node.as_dict(order) for order, node in enumerate(self.nodes)],
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {
                "ds": {"scale": self.scale, "offset": [round(side / self.scale) for side in CORNER]}
            },
            "version": 0.4,
        }


def as_json(content: dict[str, Any]) -> str:
    """A file's text."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

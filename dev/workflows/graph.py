"""Graph files of ComfyUI's editor, written from Python: nodes, links, groups, places.

Knows which sockets and widgets the nodes have, so that a workflow reads as what it does; a test
compares this with what the host says about its nodes.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

# Pixels. Enough for a node as the editor draws it on its canvas (a widget is 24 high) and as HTML.
TITLE, SLOT, WIDGET, GAP, GUTTER = 30, 20, 27, 28, 80
GROUP_TOP, GROUP_SIDE = 46, 16
COLUMN = 320
BADGE = 32  # newer editors write below a node which extension it is from
MODEL_COLOURS = {"color": "#322", "bgcolor": "#533"}
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


SPECS: dict[str, Spec] = {
    "MarkdownNote": Spec(widgets=("text",), extra=260, look=NOTE_COLOURS),
    # loaders
    "UNETLoader": Spec(
        outputs={"MODEL": "MODEL"}, widgets=("unet_name", "weight_dtype"), look=MODEL_COLOURS
    ),
    "DualCLIPLoader": Spec(
        outputs={"CLIP": "CLIP"},
        widgets=("clip_name1", "clip_name2", "type", "device"),
        look=MODEL_COLOURS,
    ),
    "VAELoader": Spec(outputs={"VAE": "VAE"}, widgets=("vae_name",), look=MODEL_COLOURS),
    "Omini2DemoModel": Spec(
        outputs={"model": "MODEL", "clip": "CLIP", "vae": "VAE"}, look=MODEL_COLOURS
    ),
    # pictures
    "LoadImage": Spec(
        outputs={"IMAGE": "IMAGE", "MASK": "MASK"}, widgets=("image", "upload"), extra=310
    ),
    "Omini2DemoImage": Spec(outputs={"image": "IMAGE"}, widgets=("photo",)),
    "ImageScale": Spec(
        inputs={"image": "IMAGE"},
        outputs={"IMAGE": "IMAGE"},
        widgets=("upscale_method", "width", "height", "crop"),
    ),
    "ImageScaleToMaxDimension": Spec(
        inputs={"image": "IMAGE"},
        outputs={"IMAGE": "IMAGE"},
        widgets=("upscale_method", "largest_size"),
    ),
    "ImageStitch": Spec(
        inputs={"image1": "IMAGE", "image2": "IMAGE"},
        outputs={"IMAGE": "IMAGE"},
        widgets=("direction", "match_image_size", "spacing_width", "spacing_color"),
    ),
    "Canny": Spec(
        inputs={"image": "IMAGE"},
        outputs={"IMAGE": "IMAGE"},
        widgets=("low_threshold", "high_threshold"),
    ),
    "ImagePadForOutpaint": Spec(
        inputs={"image": "IMAGE"},
        outputs={"IMAGE": "IMAGE", "MASK": "MASK"},
        widgets=("left", "top", "right", "bottom", "feathering"),
    ),
    "ImageCompositeMasked": Spec(
        inputs={"destination": "IMAGE", "source": "IMAGE", "mask": "MASK"},
        outputs={"IMAGE": "IMAGE"},
        widgets=("x", "y", "resize_source"),
    ),
    "ImageBlur": Spec(
        inputs={"image": "IMAGE"},
        outputs={"IMAGE": "IMAGE"},
        widgets=("blur_radius", "sigma"),
    ),
    "ImageRGBToYUV": Spec(
        inputs={"image": "IMAGE"}, outputs={"Y": "IMAGE", "U": "IMAGE", "V": "IMAGE"}
    ),
    "JoinImageWithAlpha": Spec(
        inputs={"image": "IMAGE", "alpha": "MASK"}, outputs={"IMAGE": "IMAGE"}
    ),
    "SplitImageWithAlpha": Spec(
        inputs={"image": "IMAGE"}, outputs={"IMAGE": "IMAGE", "MASK": "MASK"}
    ),
    # masks
    "SolidMask": Spec(outputs={"MASK": "MASK"}, widgets=("value", "width", "height")),
    "MaskComposite": Spec(
        inputs={"destination": "MASK", "source": "MASK"},
        outputs={"MASK": "MASK"},
        widgets=("x", "y", "operation"),
    ),
    "GrowMask": Spec(
        inputs={"mask": "MASK"}, outputs={"MASK": "MASK"}, widgets=("expand", "tapered_corners")
    ),
    "MaskToImage": Spec(inputs={"mask": "MASK"}, outputs={"IMAGE": "IMAGE"}),
    "ImageToMask": Spec(inputs={"image": "IMAGE"}, outputs={"MASK": "MASK"}, widgets=("channel",)),
    "PreviewImage": Spec(inputs={"images": "IMAGE"}, extra=320, room=24),
    "SaveImage": Spec(inputs={"images": "IMAGE"}, widgets=("filename_prefix",), extra=460),
    # text
    "CLIPTextEncode": Spec(
        inputs={"clip": "CLIP"},
        outputs={"CONDITIONING": "CONDITIONING"},
        widgets=("text",),
        extra=90,
        look=TEXT_COLOURS,
    ),
    "FluxGuidance": Spec(
        inputs={"conditioning": "CONDITIONING"},
        outputs={"CONDITIONING": "CONDITIONING"},
        widgets=("guidance",),
    ),
    "ConditioningZeroOut": Spec(
        inputs={"conditioning": "CONDITIONING"}, outputs={"CONDITIONING": "CONDITIONING"}
    ),
    # conditions
    "Omini2ConditionEncode": Spec(
        inputs={"image": "IMAGE", "vae": "VAE", "mask": "MASK"},
        outputs={"condition": "OMINI2_CONDITION"},
        widgets=(
            "placement",
            "delta_rows",
            "delta_cols",
            "position_scale",
            "resize",
            "size",
        ),
    ),
    "Omini2CompactTokens": Spec(
        inputs={"condition": "OMINI2_CONDITION", "mask": "MASK"},
        outputs={"condition": "OMINI2_CONDITION", "tokens": "IMAGE", "count": "INT"},
        widgets=(
            "compression",
            "position_correcting",
            "prune",
            "threshold",
            "grow",
            "token_integration",
            "shift_schedule",
        ),
        room=190,
    ),
    "Omini2ApplyLoRA": Spec(
        inputs={"model": "MODEL", "condition": "OMINI2_CONDITION"},
        outputs={"model": "MODEL"},
        widgets=(
            "lora_name",
            "strength",
            "condition_scale",
            "attention",
            "start_percent",
            "end_percent",
        ),
        room=170,
    ),
    "Omini2ConditionCache": Spec(
        inputs={"model": "MODEL"},
        outputs={"model": "MODEL"},
        widgets=("reuse", "refresh_every", "storage", "keep_on"),
        room=90,
    ),
    "Omini2ImageGuidance": Spec(
        inputs={"model": "MODEL"}, outputs={"model": "MODEL"}, widgets=("image_guidance_scale",)
    ),
    "Omini2SaveCache": Spec(
        inputs={"model": "MODEL", "positive": "CONDITIONING", "latent_image": "LATENT"},
        widgets=("filename_prefix", "description"),
        extra=60,
    ),
    "Omini2LoadCache": Spec(
        inputs={"model": "MODEL"},
        outputs={"model": "MODEL", "description": "STRING"},
        widgets=("cache_name", "condition_scale", "start_percent", "end_percent"),
    ),
    "Omini2TrainLoRA": Spec(
        inputs={"clip": "CLIP", "vae": "VAE"},
        outputs={"lora_name": "STRING", "loss_curve": "IMAGE"},
        widgets=(
            "base",
            "images",
            "condition",
            "condition_folder",
            "attention",
            "size",
            "compression",
            "delta_rows",
            "delta_cols",
            "steps",
            "batch_size",
            "rank",
            "optimizer",
            "learning_rate",
            "quantize",
            "checkpoint_every",
            "seed",
            "control_after_generate",
            "lora_name",
            "resume",
        ),
        extra=60,
    ),
    # sampling
    "EmptySD3LatentImage": Spec(
        outputs={"LATENT": "LATENT"}, widgets=("width", "height", "batch_size")
    ),
    "KSampler": Spec(
        inputs={
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
        },
        outputs={"LATENT": "LATENT"},
        widgets=(
            "seed",
            "control_after_generate",
            "steps",
            "cfg",
            "sampler_name",
            "scheduler",
            "denoise",
        ),
    ),
    "VAEEncode": Spec(inputs={"pixels": "IMAGE", "vae": "VAE"}, outputs={"LATENT": "LATENT"}),
    "VAEDecode": Spec(inputs={"samples": "LATENT", "vae": "VAE"}, outputs={"IMAGE": "IMAGE"}),
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
        out = {
            "id": self.id,
            "type": self.kind,
            "pos": [self.x, self.y],
            "size": [self.width, self.height],
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": [
                {"name": name, "type": kind, "link": self.links.get(name)}
                for name, kind in spec.inputs.items()
            ],
            "outputs": [
                {"name": name, "type": kind, "links": self.used_by.get(name, [])}
                for name, kind in spec.outputs.items()
            ],
            "properties": self._properties(),
            "widgets_values": self.values,
            **spec.look,
        }
        return {**out, "title": self.title} if self.title else out

    def _properties(self) -> dict[str, str]:
        """What the editor and node managers go by to say which package a missing node is from."""
        if self.kind == "MarkdownNote":
            return {}
        ours = self.kind.startswith("Omini2")
        return {
            "cnr_id": "comfyui-omini2" if ours else "comfy-core",
            "Node name for S&R": self.kind,
        }


@dataclass(frozen=True)
class Socket:
    """One output of a node."""

    node: Node
    output: str

    @property
    def kind(self) -> str:
        """The type of what comes out."""
        return SPECS[self.node.kind].outputs[self.output]


class Graph:
    """A workflow under construction."""

    def __init__(self, name: str) -> None:
        self.name = name
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
        node = Node(len(self.nodes) + 1, kind, title, list(values), height=spec.height + extra)
        self.nodes.append(node)
        for name, source in links.items():
            self._link(source.socket if isinstance(source, Node) else source, node, name)
        return node

    def _link(self, source: Socket, target: Node, name: str) -> None:
        inputs = SPECS[target.kind].inputs
        if inputs.get(name) != source.kind:
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

    def stack(self, column: int, y: int, title: str, *nodes: Node, width: int = COLUMN) -> int:
        """Places nodes one below the other in a titled group (or none); returns where it ends.

        Args:
            column: which of the columns, each `COLUMN` wide, from the left.
            y: the group's upper edge.
        """
        x = column * (COLUMN + 2 * GROUP_SIDE + GUTTER)
        cursor = y + GROUP_TOP
        for node in nodes:
            node.x, node.y, node.width = x, cursor + TITLE, width
            badge = BADGE if node.kind.startswith("Omini2") else 0
            cursor = node.y + node.height + SPECS[node.kind].room + badge + GAP
        bottom = cursor - GAP + GROUP_SIDE
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
            "extra": {"ds": {"scale": 0.6, "offset": [120, 100]}},
            "version": 0.4,
        }

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"

"""Makes subgraphs/*.json, which ComfyUI lists in its node library: `python -m dev.workflows.make`.

Each is one node with picture, prompt, LoRA and strength outside, and the plain nodes of a template
inside, where they can be looked at and changed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dev.workflows.graph import COLUMN, GUTTER, SPECS, Graph, Node, Socket
from dev.workflows.parts import (
    GUIDANCE,
    PHOTO_EDGES,
    SCENE_EDGES,
    Base,
    Models,
    apply_lora,
    base,
    cache,
    cached,
    compact,
    condition,
    demo_model,
    edges,
    kontext,
    no_negative,
    prompt,
    sample,
    sample_latent,
)

IN, OUT = -10, -20  # the ids that a subgraph's own ends have
ROW = 20  # pixels, of a socket at such an end
TEXT, CHOICE, NUMBER, WHOLE = "STRING", "COMBO", "FLOAT", "INT"
WIDGETS = {  # of the nodes some of whose widgets stand outside: the types
    "text": TEXT,
    **dict.fromkeys(("ckpt_name", "unet_name", "weight_dtype", "lora_name", "attention"), CHOICE),
    **dict.fromkeys(("family", "sampler_name", "scheduler"), CHOICE),
    **dict.fromkeys(("select", "reset_steps", "fusion"), CHOICE),
    **dict.fromkeys(("strength", "condition_scale", "image_guidance_scale"), NUMBER),
    **dict.fromkeys(("start_percent", "end_percent", "cfg", "denoise", "threshold"), NUMBER),
    **dict.fromkeys(("seed", "steps", "full_steps", "grow"), WHOLE),
}


@dataclass
class Outside:
    """An input of the one node.

    Attributes:
        label: what it is called there.
        node, name: what it sets inside: a socket, or a widget.
    """

    label: str
    node: Node
    name: str


@dataclass
class Blueprint:
    """A subgraph with its ends.

    Attributes:
        says: what it does, in a sentence.
        result: what comes out.
    """

    graph: Graph
    says: str
    inputs: list[Outside]
    result: Socket

    @property
    def name(self) -> str:
        return self.graph.name

    def as_dict(self) -> dict[str, Any]:
        """The file's content: a workflow with nothing but the one node."""
        own = str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-omini2/subgraphs/{self.name}"))
        definition = self._definition(own)
        slots = [_slot(each, link=None) for each in self.inputs]
        node = {
            "id": len(self.graph.nodes) + 1,
            "type": own,
            "pos": [0, 0],
            "size": [360, 60 + 30 * len(slots)],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": slots,
            "outputs": [{"name": "image", "type": "IMAGE", "links": None}],
            "properties": {"cnr_id": "comfyui-omini2"},
            "widgets_values": [],
            "title": self.name,
        }
        return {
            "id": own,
            "revision": 0,
            "last_node_id": node["id"],
            "last_link_id": definition["state"]["lastLinkId"],
            "nodes": [node],
            "links": [],
            "groups": [],
            "definitions": {"subgraphs": [definition]},
            "config": {},
            "extra": {"BlueprintDescription": self.says},
            "version": 0.4,
        }

    def _definition(self, own: str) -> dict[str, Any]:
        nodes = {node.id: node.as_dict(order) for order, node in enumerate(self.graph.nodes)}
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        links = [dict(zip(keys, link, strict=True)) for link in self.graph.links]
        ends: dict[str, list[dict[str, Any]]] = {"inputs": [], "outputs": []}

        def link(**ends: Any) -> int:
            links.append({"id": len(links) + 1, **ends})
            return len(links)

        def end(side: str, given: dict[str, Any], number: int) -> None:
            name = f"{own}/{side}/{given['name']}"
            known = {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)), "linkIds": [number]}
            ends[side].append({**known, **given})

        for number, each in enumerate(self.inputs):
            slots = nodes[each.node.id]["inputs"]
            if each.name in WIDGETS and len(slots) == len(SPECS[each.node.kind].inputs):
                # The editor counts all of them, behind the sockets.
                widgets = SPECS[each.node.kind].widgets
                slots += [_widget_slot(name) for name in widgets if name in WIDGETS]
            slot = next(slot for slot in slots if slot["name"] == each.name)
            goes = {"target_id": each.node.id, "target_slot": slots.index(slot)}
            slot["link"] = link(origin_id=IN, origin_slot=number, **goes, type=slot["type"])
            given = {"name": each.name, "label": each.label, "type": slot["type"]}
            end("inputs", given, slot["link"])
        source = self.result.node
        outputs = nodes[source.id]["outputs"]
        slot = next(s for s in outputs if s["name"] == self.result.output)
        comes = {"origin_id": source.id, "origin_slot": outputs.index(slot)}
        last = link(**comes, target_id=OUT, target_slot=0, type="IMAGE")
        slot["links"] = [*slot["links"], last]
        end("outputs", {"name": "image", "type": "IMAGE"}, last)

        right = max(node.x + node.width for node in self.graph.nodes) + GUTTER
        height = ROW * (len(self.inputs) + 2)
        return {
            "id": own,
            "version": 1,
            "state": {
                "lastGroupId": 0,
                "lastNodeId": len(nodes) + 1,
                "lastLinkId": len(links),
                "lastRerouteId": 0,
            },
            "revision": 0,
            "config": {},
            "name": self.name,
            "inputNode": {"id": IN, "bounding": [-COLUMN, 0, 160, height]},
            "outputNode": {"id": OUT, "bounding": [right, 0, 120, 60]},
            **ends,
            "widgets": [],
            "nodes": list(nodes.values()),
            "groups": [],
            "links": links,
            "extra": {},
            "category": "Omini2",
        }


def _widget_slot(name: str) -> dict[str, Any]:
    return {"name": name, "type": WIDGETS[name], "widget": {"name": name}, "link": None}


def _slot(outside: Outside, link: int | None) -> dict[str, Any]:
    """The input of the one node."""
    if outside.name in WIDGETS:
        return {**_widget_slot(outside.name), "label": outside.label, "link": link}
    kind = {"image": "IMAGE", "mask": "MASK"}[outside.name]
    return {"name": outside.name, "label": outside.label, "type": kind, "link": link}


def _in_columns(graph: Graph, *columns: list[Node]) -> None:
    for number, nodes in enumerate(columns):
        graph.stack(number, 0, "", *nodes)


def _outside(image: Node, text: Node, lora: Node, sampler: Node, models: Models) -> list[Outside]:
    """What all with a condition LoRA have."""
    found = [
        Outside("image", image, "image"),
        Outside("prompt", text, "text"),
        Outside("LoRA", lora, "lora_name"),
        Outside("strength", lora, "condition_scale"),
        Outside("seed", sampler, "seed"),
    ]
    (loader,) = models.nodes
    if "ckpt_name" in SPECS[loader.kind].widgets:
        found.append(Outside("FLUX.1", loader, "ckpt_name"))
    return found


def _plain(b: Base, steps: list[Node], encode: Node, lora: str, says: str) -> Blueprint:
    """A condition that lies on the picture, or beside it, and no more.

    Args:
        steps: what becomes of the image, the first of which takes it.
    """
    graph = b.graph
    omini2 = cached(graph, b.models.model, encode, lora)
    text = prompt(graph, b.models.clip, "", GUIDANCE)
    sampling = sample(graph, omini2[-1], text, b.models.vae, b.side, b.steps)
    _in_columns(graph, b.models.nodes, steps, omini2, text, sampling)
    inputs = _outside(steps[0], text[0], omini2[0], sampling[1], b.models)
    return Blueprint(graph, says, inputs, sampling[-1].socket)


def _sized(b: Base) -> Node:
    """A picture at the size of the new one."""
    return b.graph.add("ImageScale", "lanczos", b.side, b.side, "center")


def edges_to_image(demo: bool) -> Blueprint:
    b = base("Omini2 Edges", demo)
    scaled = _sized(b)
    canny, encode = edges(b.graph, scaled, b.models.vae, SCENE_EDGES if demo else PHOTO_EDGES)
    says = "Draws what the prompt says along the edges of a picture, with FLUX.1."
    return _plain(b, [scaled, canny, encode], encode, b.lora("canny.safetensors", "edges"), says)


def depth_to_image(demo: bool) -> Blueprint:
    b = base("Omini2 Depth", demo)
    encode = condition(b.graph, None, b.models.vae, "aligned", "crop", b.side)
    says = "Fills the room of a depth map (near is white) with what the prompt says, with FLUX.1."
    return _plain(b, [encode], encode, b.lora("depth.safetensors", "depth"), says)


def deblurring(demo: bool) -> Blueprint:
    b = base("Omini2 Deblurring", demo)
    encode = condition(b.graph, None, b.models.vae, "aligned", "crop", b.side)
    says = "Draws a blurred picture sharp, as the prompt describes it, with FLUX.1."
    return _plain(b, [encode], encode, b.lora("deblurring.safetensors", "deblurring"), says)


def subject(demo: bool) -> Blueprint:
    b = base("Omini2 Subject", demo)
    graph = b.graph
    # Each where its LoRA was trained to look for it.
    placement, size = ("left", 64) if demo else ("right", b.side)
    encode = condition(graph, None, b.models.vae, placement, "crop", size)
    lora = b.lora("subject_512.safetensors", "subject")
    says = "Draws the thing on a picture, *this item* in the prompt, somewhere else, with FLUX.1."
    if demo:
        return _plain(b, [encode], encode, lora, says)
    applied = apply_lora(graph, b.models.model, encode, lora)
    guided = graph.add("Omini2ImageGuidance", 1.5, model=applied)
    omini2 = [applied, guided, cache(graph, guided)]
    text = prompt(graph, b.models.clip, "", GUIDANCE)
    sampling = sample(graph, omini2[-1], text, b.models.vae, b.side, b.steps)
    _in_columns(graph, b.models.nodes, [encode], omini2, text, sampling)
    inputs = _outside(encode, text[0], applied, sampling[1], b.models)
    inputs.insert(4, Outside("image guidance", guided, "image_guidance_scale"))
    return Blueprint(graph, says, inputs, sampling[-1].socket)


def inpainting(demo: bool) -> Blueprint:
    b = base("Omini2 Inpainting", demo)
    graph, vae = b.graph, b.models.vae
    encode = condition(graph, None, vae, "aligned", "crop", b.side)
    compacted = compact(graph, encode, token_integration=True)
    omini2 = cached(graph, b.models.model, compacted, b.lora("fill.safetensors", "inpainting"))
    text = prompt(graph, b.models.clip, "", GUIDANCE)
    sampling = sample(graph, omini2[-1], text, vae, b.side, b.steps)
    links = {"samples": sampling[1], "reference": encode["image"], "vae": vae}
    kept = graph.add("Omini2KeepUnchanged", 8, image=sampling[-1], **links)
    _in_columns(graph, b.models.nodes, [encode, compacted], omini2, text, [*sampling, kept])
    inputs = _outside(encode, text[0], omini2[0], sampling[1], b.models)
    inputs.insert(1, Outside("mask", compacted, "mask"))
    says = "Paints what a mask marks anew and leaves every other pixel as it was, with FLUX.1."
    return Blueprint(graph, says, inputs, kept["image"])


def _reference(graph: Graph, models: Models, demo: bool) -> tuple[list[Node], list[Node]]:
    """The picture to edit as a latent, and the prompt that refers to it."""
    if demo:
        scaled = graph.add("ImageScale", "lanczos", 256, 256, "center")
    else:
        scaled = graph.add("FluxKontextImageScale")
    latent = graph.add("VAEEncode", pixels=scaled, vae=models.vae)
    encode = graph.add("CLIPTextEncode", "", title="Prompt", clip=models.clip)
    referring = graph.add("ReferenceLatent", conditioning=encode, latent=latent)
    positive = graph.add("FluxGuidance", 2.5, conditioning=referring)
    return [scaled, latent], [encode, referring, positive, no_negative(graph, encode)]


def _edited(photo: Node, text: Node, sampler: Node, models: Models) -> list[Outside]:
    found = [
        Outside("image", photo, "image"),
        Outside("prompt", text, "text"),
        Outside("seed", sampler, "seed"),
    ]
    if len(models.nodes) > 1:
        found.append(Outside("FLUX.1 Kontext", models.nodes[0], "unet_name"))
    return found


def kontext_edit(demo: bool) -> Blueprint:
    graph = Graph("Omini2 Kontext Edit")
    models = demo_model(graph) if demo else kontext(graph)
    photo, text = _reference(graph, models, demo)
    kept = cache(graph, models.model)
    sampling = sample_latent(graph, kept, text, models.vae, photo[-1], 12 if demo else 20)[1:]
    _in_columns(graph, models.nodes, photo, [kept], text, sampling)
    inputs = _edited(photo[0], text[0], sampling[0], models)
    says = "Changes a picture as the prompt says, with FLUX.1 Kontext whose reference is reused."
    return Blueprint(graph, says, inputs, sampling[-1].socket)


def spot_edit(demo: bool) -> Blueprint:
    graph = Graph("Omini2 Spot Edit")
    models = demo_model(graph) if demo else kontext(graph)
    photo, text = _reference(graph, models, demo)
    # The demo model's VAE has no features to compare.
    values = ("latent" if demo else "perceptual", 0.2, 4, "auto", "off", 0)
    spot = graph.add("Omini2SpotEdit", *values, model=models.model, vae=models.vae)
    steps = 12 if demo else 28
    sampling = sample_latent(graph, spot, text, models.vae, photo[-1], steps)[1:]
    links = {"samples": sampling[0], "reference": photo[0], "vae": models.vae}
    kept = graph.add("Omini2KeepUnchanged", 8, image=sampling[-1], **links)
    _in_columns(graph, models.nodes, photo, [spot], text, [*sampling, kept])
    inputs = _edited(photo[0], text[0], sampling[0], models)
    inputs.insert(2, Outside("threshold", spot, "threshold"))
    says = (
        "Changes a part of a picture as the prompt says, with FLUX.1 Kontext, and no other pixel."
    )
    return Blueprint(graph, says, inputs, kept["image"])


BLUEPRINTS: list[Callable[[bool], Blueprint]] = [
    edges_to_image,
    depth_to_image,
    deblurring,
    inpainting,
    subject,
    kontext_edit,
    spot_edit,
]

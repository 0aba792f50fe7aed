"""What a warning offers to set: in which node of a graph, and that it helps."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import (
    LatentVae,
    apply,
    compact,
    flux_config,
    make_model,
    prompt,
    random_lora,
    sample,
)

from omini2_extension.nodes import ConditionEncode
from omini2_extension.omini2_core import errors
from omini2_extension.omini2_core.errors import Remedy
from omini2_extension.omini2_core.host.remedies import place


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


GRAPH = {
    "1": node("Omini2ConditionEncode", image=["9", 0], placement="right", size=512),
    "2": node("Omini2CompactTokens", condition=["1", 0], mask=["9", 1], compression=0.5),
    "3:4": node("Omini2ApplyLoRA", model=["9", 0], condition=["2", 0], family="auto"),
    "5": node("EmptySD3LatentImage", width=["6", 0], height=512, batch_size=1),
    "6": node("ImageScale", width=512, height=512, image=["9", 0]),
    "7": node("KSampler", model=["3:4", 0], latent_image=["5", 0], cfg=7, steps=4),
    "8": node("SamplerCustomAdvanced", guider=["10", 0], latent_image=["5", 0]),
    "9": node("Loop", width=1, height=1, image=["9", 0]),
    "10": node("CFGGuider", model=["3:4", 0], cfg=7),
}


@pytest.mark.parametrize(
    ("running", "remedy", "found"),
    [
        ("3:4", Remedy({"family": "IEAP"}), "3:4"),
        ("3:4", Remedy({"placement": "fit"}, ("condition",)), "1"),
        ("3:4", Remedy({"compression": 0.25}, ("condition",)), "2"),
        ("7", Remedy({"placement": "fit"}, ("condition",), "3:4"), "1"),
        ("7", Remedy({"cfg": 1.0}, ("guider",)), "7"),
        ("8", Remedy({"cfg": 1.0}, ("guider",)), "10"),
        ("8", Remedy({"family": "IEAP"}, ("model", "guider")), "3:4"),
        ("7", Remedy({"batch_size": 2}, ("latent_image",)), "5"),
        # A wire brings the latent's width: it is set where that comes from.
        ("7", Remedy({"width": 256, "height": 256}, ("latent_image",)), "6"),
        ("3:4", Remedy({"cfg": 1.0}, ("condition", "model")), None),
        ("3:4", Remedy({"placement": "fit"}), None),
        ("unknown", Remedy({"cfg": 1.0}), None),
        (None, Remedy({"cfg": 1.0}), None),
    ],
)
def test_the_node_to_set_is_found_by_the_wires(running, remedy, found) -> None:
    assert place(remedy, GRAPH, running) == found


@pytest.fixture
def said() -> Iterator[list[tuple[str, Any]]]:
    """All warnings with their remedies."""
    heard: list[tuple[str, Any]] = []

    def listen(message: str, remedies: Any) -> None:
        heard.append((message, remedies))

    errors.on_warning(listen)
    yield heard
    errors._listeners.remove(listen)


SETTINGS = {
    "placement": "aligned", "delta_rows": 0, "delta_cols": 0, "position_scale": 1.0,
    "resize": "off", "size": 512, "compression": 1.0, "attention": "auto", "family": "auto",
    "width": 256, "height": 256, "batch_size": 1, "steps": 1, "guidance": 3.5,
}  # fmt: skip


def run(lora: str, **changes: Any) -> None:
    """A graph of Condition Encode, Compact Tokens, Apply Omini2 LoRA and a sampler."""
    given = {**SETTINGS, **changes}
    names = ("placement", "delta_rows", "delta_cols", "position_scale")
    image = torch.rand(given.pop("images", 1), 256, 256, 3)
    placed = (given[name] for name in names)
    condition = ConditionEncode.execute(
        image, LatentVae(), *placed, None, given["resize"], given["size"]
    )[0]
    condition = compact(condition, compression=given["compression"])[0]
    model = make_model(flux_config(True))
    model = apply(model, condition, lora, attention=given["attention"], family=given["family"])
    sample(
        model,
        given["height"] // 16,
        given["width"] // 16,
        batch=given["batch_size"],
        steps=given["steps"],
        positive=prompt(0, guidance=given["guidance"]),
    )


OWN = {
    "omini2.independent_condition": "true", "omini2.position_delta": "0,0",
    "omini2.position_scale": "1", "omini2.condition_size": "256x256",
    "omini2.target_size": "256x256", "omini2.compression": "1", "omini2.integration": "false",
    "omini2.base_model": "demo",
}  # fmt: skip
SMALL = {**OWN, "omini2.condition_size": "128x128", "omini2.position_scale": "2"}
BESIDE = {**OWN, "omini2.position_delta": "0,-16"}
MOVED = {**OWN, "omini2.position_delta": "3,-5"}


@pytest.mark.parametrize(
    ("name", "metadata", "settings", "begins", "remedies"),
    [
        ("own", OWN, {"attention": "joint"}, "attention: ", 1),
        ("own", OWN, {"placement": "left"}, "placement: ", 1),
        ("own", BESIDE, {}, "placement: ", 1),
        ("own", MOVED, {}, "placement: ", 1),
        ("own", MOVED, {"placement": "right"}, "placement: ", 1),
        ("own", OWN, {"position_scale": 2.0}, "position_scale: ", 1),
        ("own", SMALL, {}, "condition: ", 2),
        ("own", SMALL, {"compression": 0.25}, "condition: ", 2),
        ("own", OWN, {"width": 512, "height": 512}, "placement: aligned, ", 2),
        ("own", OWN, {"images": 3}, "image: it holds 3", 1),
        ("canny", {}, {"placement": "right"}, "placement: ", 1),
        ("subject_1024_beta", {}, {}, "placement: ", 1),
        ("canny", {"omini2.family": "UniCombine"}, {"steps": 3}, "steps: ", 1),
        ("canny", {}, {"guidance": 1.5}, "guidance: ", 1),
        ("canny", {}, {"guidance": 30.0}, "guidance: ", 1),
        ("unheard_of", {"omini2.family": ""}, {}, "family: ", 4),
    ],
)
def test_a_remedy_leaves_nothing_to_say(said, name, metadata, settings, begins, remedies) -> None:
    lora = random_lora(f"{name}.safetensors", **metadata)
    run(lora, **settings)
    (found,) = (offered for message, offered in said if message.startswith(begins))
    assert len(found) == remedies
    for remedy in found:
        said.clear()
        run(lora, **{**settings, **remedy.values})
        assert [message for message, _ in said if message.startswith(begins.split()[0])] == []


def test_what_is_usual_is_not_warned_about(said) -> None:
    run(random_lora("canny.safetensors"), steps=14, guidance=2.5)
    assert not [message for message, _ in said if message.startswith(("steps", "guidance", "cfg"))]


def test_image_guidance_that_a_lora_needs_is_missed(said) -> None:
    run(random_lora("subject_512.safetensors"), placement="right")
    (message,) = (message for message, _ in said if message.startswith("image_guidance_scale: "))
    assert "1.5" in message


@pytest.mark.parametrize(("cfg", "warned"), [(1.0, 0), (3.0, 0), (7.0, 1)])
def test_cfg_of_a_distilled_model(said, cfg, warned) -> None:
    condition = ConditionEncode.execute(
        torch.rand(1, 96, 96, 3), LatentVae(), "aligned", 0, 0, 1.0
    )[0]
    sample(
        apply(make_model(flux_config(False)), condition, random_lora("own.safetensors", **OWN)),
        cfg=cfg,
    )
    about = [remedies for message, remedies in said if message.startswith("cfg: ")]
    assert len(about) == warned
    assert all(remedy.values == {"cfg": 1.0} for (remedy,) in about)

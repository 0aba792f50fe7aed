"""What the host's real server refuses when a prompt is queued, before anything is loaded."""

import asyncio
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from safetensors.torch import save_file

from dev.host.prompts import ObjectInfo, Prompt, to_prompt
from dev.host.server import Server
from dev.paths import ROOT

pytestmark = pytest.mark.xdist_group("server")

TEMPLATES = [
    path
    for path in sorted((ROOT / "example_workflows").glob("*demo-model.json"))
    if "Omini2LoadCache" not in path.read_text(encoding="utf-8")  # which needs a file of one's own
]


def prompt_of(name: str, info: ObjectInfo) -> Prompt:
    path = ROOT / "example_workflows" / f"{name}.json"
    return to_prompt(json.loads(path.read_text(encoding="utf-8")), info)


def queue(server: Server, prompt: Prompt) -> tuple[int, dict[str, Any]]:
    """The server's answer to a prompt; one that it took is taken out of the queue again."""

    async def send() -> tuple[int, dict[str, Any]]:
        async with aiohttp.ClientSession(server.address) as session:
            async with session.post("/prompt", json={"prompt": prompt}) as answer:
                status, content = answer.status, await answer.json()
            await session.post("/queue", json={"clear": True})
            await session.post("/interrupt")
            return status, content

    return asyncio.run(send())


def said(server: Server, prompt: Prompt) -> list[tuple[str, str]]:
    """What is said of which node: its type, and the sentence."""
    _, answer = queue(server, prompt)  # a graph with a preview is taken, the rest of it left out
    return [
        (each["class_type"], error["details"])
        for each in answer["node_errors"].values()
        for error in each["errors"]
    ]


def changed(prompt: Prompt, kind: str, change: Callable[[dict[str, Any]], object]) -> Prompt:
    """The prompt with other inputs of the nodes of a type."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if node["class_type"] == kind:
            change(node["inputs"])
    return prompt


@pytest.fixture
def ordinary(loras: Path) -> None:
    """A LoRA for text tokens too, which no condition passes through."""
    text = "transformer.transformer_blocks.0.attn.add_q_proj.lora_{}.weight"
    parts = {"A": torch.ones(4, 64), "B": torch.ones(64, 4)}
    tensors = {text.format(part): tensor for part, tensor in parts.items()}
    save_file(tensors, loras / "ordinary.safetensors")


APPLY, COMPACT = "Omini2ApplyLoRA", "Omini2CompactTokens"


@pytest.mark.parametrize(
    ("template", "kind", "inputs", "details"),
    [
        ("try-it-without-a-checkpoint", APPLY, {"lora_name": "gone.safetensors"},
         "lora_name - there is no gone.safetensors in ComfyUI's loras folder"),
        ("try-it-without-a-checkpoint", APPLY, {"lora_name": "(none)"},
         "lora_name - (none) is for PhotoDoodle"),
        ("try-it-without-a-checkpoint", APPLY, {"lora_name": "ordinary.safetensors"},
         "lora_name - ordinary.safetensors is an ordinary LoRA, not a condition LoRA"),
        ("try-it-without-a-checkpoint", APPLY, {"family": "EasyControl"},
         "lora_name - family: omini2_demo_edges.safetensors doesn't have the keys"),
        ("try-it-without-a-checkpoint", APPLY, {"family": "OmniPaint", "attention": "independent"},
         "lora_name - attention: OmniPaint's LoRAs were trained with conditions that look"),
        ("try-it-without-a-checkpoint", APPLY, {"start_percent": 0.8, "end_percent": 0.2},
         "lora_name - start_percent: 0.8 is not below end_percent (0.2)"),
        ("inpainting-demo-model", COMPACT, {"compression": 0.5},
         "token_integration - compression: token_integration needs the condition at"),
        ("inpainting-demo-model", COMPACT, {"prune": "mask"},
         "token_integration - prune: with token_integration the mask marks what to paint"),
        ("inpainting-demo-model", COMPACT, {"mask": None},
         "token_integration - mask: token_integration needs one"),
        ("inpainting-demo-model", "Omini2ConditionEncode", {"placement": "left"},
         "token_integration - the condition has to lie on the picture token by token"),
        ("inpainting-demo-model", "Omini2ConditionEncode", {"position_scale": 2.0},
         "token_integration - the condition has to lie on the picture token by token"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_at_once(
    server: Server, info: ObjectInfo, ordinary: None, template, kind, inputs, details
) -> None:
    def change(given: dict[str, Any]) -> None:
        given.update(inputs)
        for name in [name for name, value in inputs.items() if value is None]:
            del given[name]

    prompt = changed(prompt_of(template, info), kind, change)
    begun = time.monotonic()
    ((_, sentence),) = said(server, prompt)
    assert time.monotonic() - begun < 5
    assert sentence.startswith(details)


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


@pytest.mark.parametrize(
    ("checked", "details"),
    [
        (node("Omini2LoadCache", cache_name="gone.safetensors", condition_scale=1.0,
              start_percent=0.0, end_percent=1.0), "cache_name - there is no gone.safetensors"),
        (node("Omini2SpotEdit", select="perceptual", threshold=0.2, full_steps=4,
              reset_steps="auto", fusion="off", grow=0), "reset_steps - vae: select perceptual"),
        (node("Omini2SpotEdit", select="mask", threshold=0.2, full_steps=4,
              reset_steps="auto", fusion="off", grow=0), "reset_steps - mask: select mask needs"),
        (node("Omini2SpotEdit", select="latent", threshold=0.2, full_steps=4,
              reset_steps="soon", fusion="off", grow=0), "reset_steps - soon is no list of steps"),
    ],
)  # fmt: skip
def test_other_nodes_say_it_at_once_too(
    server: Server, info: ObjectInfo, checked: dict[str, Any], details: str
) -> None:
    prompt = prompt_of("try-it-without-a-checkpoint", info)
    (loader,) = (number for number, each in prompt.items() if each["class_type"] == APPLY)
    checked["inputs"]["model"] = prompt[loader]["inputs"]["model"]
    prompt["new"] = checked
    prompt = changed(prompt, "KSampler", lambda inputs: inputs.update(model=["new", 0]))
    ((kind, sentence),) = said(server, prompt)
    assert kind == checked["class_type"] and sentence.startswith(details)


def test_what_a_wire_brings_is_left_to_the_run(server: Server, info: ObjectInfo) -> None:
    prompt = prompt_of("try-it-without-a-checkpoint", info)
    prompt = changed(prompt, APPLY, lambda inputs: inputs.update(start_percent=["number", 0]))
    prompt["number"] = node("PrimitiveFloat", value=2.0)
    assert queue(server, prompt)[0] == 200


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_what_runs_is_not_refused(server: Server, info: ObjectInfo, path: Any) -> None:
    status, answer = queue(server, prompt_of(path.stem, info))
    assert status == 200 and answer["node_errors"] == {}

"""What the host's real server refuses when a prompt is queued, before anything is loaded."""

import asyncio
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from safetensors.torch import save_file

from dev.host.prompts import ObjectInfo, Prompt, to_prompt
from dev.host.server import Server
from dev.paths import ROOT
from omini2_extension.omini2_core.cache.entry import Entry, KeysValues
from omini2_extension.omini2_core.cache.file import IMAGE, Fit, Saved, save
from omini2_extension.omini2_core.host.folders import FOLDER

pytestmark = pytest.mark.xdist_group("server")

ALL_TEMPLATES = sorted((ROOT / "example_workflows").glob("*.json"))
TEMPLATES = [
    path
    for path in ALL_TEMPLATES
    if "demo-model" in path.stem
    and "Omini2LoadCache" not in path.read_text(encoding="utf-8")  # which needs a file of one's own
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


ENCODE, LATENT, SAMPLER = "Omini2ConditionEncode", "EmptySD3LatentImage", "KSampler"
OTHER_SIZE = (
    "token_integration - condition: token integration needs a condition of the picture's own size, "
    "but the condition is {} and the picture {}"
)


@pytest.mark.parametrize(
    ("changes", "condition", "picture"),
    [
        ({LATENT: {"width": 512}}, "256x256", "512x256"),
        ({ENCODE: {"size": 512}}, "512x512", "256x256"),
        ({ENCODE: {"resize": "off"}}, "512x512", "256x256"),  # the picture's own
        ({LATENT: {"width": 512}, SAMPLER: {"denoise": 0.5}}, "256x256", "512x256"),
    ],
)
def test_another_size_than_the_picture_s_is_refused_at_once(
    server: Server, info: ObjectInfo, changes, condition: str, picture: str
) -> None:
    prompt = prompt_of("inpainting-demo-model", info)
    for kind, inputs in changes.items():
        prompt = changed(prompt, kind, lambda given, inputs=inputs: given.update(inputs))
    ((kind, sentence),) = said(server, prompt)
    assert kind == COMPACT
    assert sentence.startswith(OTHER_SIZE.format(condition, picture))


def wide(prompt: Prompt) -> Prompt:
    """Of another size than the condition's."""
    return changed(prompt, LATENT, lambda inputs: inputs.update(width=512))


def sized_by_a_node(prompt: Prompt) -> Prompt:
    prompt = changed(prompt, LATENT, lambda inputs: inputs.update(width=["number", 0]))
    return prompt | {"number": node("PrimitiveInt", value=512)}


def resized_by_a_node(prompt: Prompt) -> Prompt:
    (image,) = (each["inputs"]["image"] for each in prompt.values() if each["class_type"] == ENCODE)
    scaled = node("ImageScaleBy", image=image, upscale_method="area", scale_by=0.5)
    prompt = changed(prompt, ENCODE, lambda inputs: inputs.update(resize="off", image=["less", 0]))
    return prompt | {"less": scaled}


def with_nothing_to_do(prompt: Prompt) -> Prompt:
    return changed(wide(prompt), SAMPLER, lambda inputs: inputs.update(denoise=0.0))


def with_a_sampler_that_nobody_wants(prompt: Prompt) -> Prompt:
    (sampler,) = (each for each in prompt.values() if each["class_type"] == SAMPLER)
    spare = copy.deepcopy(sampler)
    spare["inputs"]["latent_image"] = ["other", 0]
    return prompt | {"spare": spare, "other": node(LATENT, width=512, height=512, batch_size=1)}


def without_integration(prompt: Prompt) -> Prompt:
    return changed(wide(prompt), COMPACT, lambda inputs: inputs.update(token_integration=False))


def scaled_to_size(prompt: Prompt) -> Prompt:
    (image,) = (each["inputs"]["image"] for each in prompt.values() if each["class_type"] == ENCODE)
    scaled = node("ImageScale", image=image, upscale_method="area", width=256, height=256,
                  crop="disabled")  # fmt: skip
    prompt = changed(prompt, ENCODE, lambda inputs: inputs.update(resize="off", image=["less", 0]))
    return prompt | {"less": scaled}


@pytest.mark.parametrize(
    "change",
    [
        sized_by_a_node,
        resized_by_a_node,
        with_nothing_to_do,
        with_a_sampler_that_nobody_wants,
        without_integration,
        scaled_to_size,
    ],
)
def test_a_size_that_fits_or_is_not_known_is_left_to_the_run(
    server: Server, info: ObjectInfo, change: Callable[[Prompt], Prompt]
) -> None:
    status, answer = queue(server, change(prompt_of("inpainting-demo-model", info)))
    assert status == 200 and answer["node_errors"] == {}


def test_compression_that_leaves_no_token_is_refused_at_once(
    server: Server, info: ObjectInfo
) -> None:
    prompt = prompt_of("depth-compressed-demo-model", info)
    prompt = changed(prompt, ENCODE, lambda inputs: inputs.update(size=64))
    left = changed(prompt, COMPACT, lambda inputs: inputs.update(compression=0.15))
    assert said(server, left) == []
    prompt = changed(prompt, COMPACT, lambda inputs: inputs.update(compression=0.1))
    ((kind, sentence),) = said(server, prompt)
    assert kind == COMPACT
    assert sentence.startswith("token_integration - compression: 0.1 leaves no token of 4x4")


@pytest.fixture
def fitted(server: Server) -> Iterator[str]:
    """A cache that is fitted to a picture of 256x256; nothing else of it counts here."""
    path = Path(server.base) / "models" / FOLDER / "fitted.safetensors"
    kept = KeysValues(torch.zeros(1, 2, 4, 64), torch.zeros(1, 2, 4, 64))
    fit = Fit("model", 1, 2, 64, "torch.float32")
    save(
        Saved(fit, 4, (16, 16), "", "", torch.zeros(1, 8), None, {IMAGE: Entry(4, {0: kept})}), path
    )
    yield path.name
    path.unlink()


@pytest.mark.parametrize(
    ("width", "inputs", "refused"),
    [
        (512, {}, True),
        (512, {"start_percent": 0.9}, False),  # by then there may be no step left
        (512, {"condition_scale": 0.0}, False),
        (256, {}, False),
    ],
)
def test_a_cache_for_another_size_is_refused_at_once(
    server: Server, info: ObjectInfo, fitted: str, width: int, inputs, refused: bool
) -> None:
    always = {"condition_scale": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    cache = node("Omini2LoadCache", cache_name=fitted, **always | inputs)
    prompt = behind_the_model(prompt_of("try-it-without-a-checkpoint", info), cache)
    prompt = changed(prompt, LATENT, lambda given: given.update(width=width))
    answers = said(server, prompt)
    if not refused:
        assert not answers
        return
    ((kind, sentence),) = answers
    assert kind == "Omini2LoadCache"
    assert sentence.startswith("cache_name - the condition was fitted to a picture of 256x256")


def behind_the_model(prompt: Prompt, new: dict[str, Any]) -> Prompt:
    """The prompt with another node on the way from the model to the sampler."""
    (loader,) = (each for each in prompt.values() if each["class_type"] == APPLY)
    new["inputs"]["model"] = loader["inputs"]["model"]
    prompt = changed(prompt, SAMPLER, lambda inputs: inputs.update(model=["new", 0]))
    return prompt | {"new": new}


def an_edit(prompt: Prompt, reference: int, picture: int | None, text: dict[str, Any]) -> Prompt:
    """Spot Edit with a reference of one width and a picture of another, or an empty latent."""
    prompt = behind_the_model(
        prompt,
        node("Omini2SpotEdit", select="latent", threshold=0.2, full_steps=4, reset_steps="auto",
             fusion="off", grow=0),
    )  # fmt: skip
    (vae,) = (each["inputs"]["vae"] for each in prompt.values() if each["class_type"] == ENCODE)
    for name, width in (("reference", reference), ("picture", picture or 256)):
        prompt[f"{name} pixels"] = node(
            "EmptyImage", width=width, height=256, batch_size=1, color=0
        )
        prompt[name] = node("VAEEncode", pixels=[f"{name} pixels", 0], vae=vae)
    prompt["text"] = text
    prompt["with it"] = node("ReferenceLatent", conditioning=["text", 0], latent=["reference", 0])
    prompt["guided"] = node("FluxGuidance", conditioning=["with it", 0], guidance=2.5)

    def connect(inputs: dict[str, Any]) -> None:
        inputs["positive"] = ["guided", 0]
        if picture is not None:
            inputs["latent_image"] = ["picture", 0]

    return changed(prompt, SAMPLER, connect)


@pytest.mark.parametrize(
    ("reference", "picture", "clip", "sizes"),
    [
        (512, 256, "demo", "512x256 and the picture 256x256"),
        (256, 256, "demo", None),
        (512, None, "demo", None),  # FLUX.2's latents have half as many pixels
        (512, None, "flux", "512x256 and the picture 256x256"),
        (256, None, "flux", None),
    ],
)
def test_a_reference_of_another_size_is_refused_at_once(
    server: Server, info: ObjectInfo, reference: int, picture: int | None, clip: str, sizes
) -> None:
    prompt = prompt_of("try-it-without-a-checkpoint", info)
    (text,) = (each for each in prompt.values() if each["inputs"].get("text"))
    if clip == "flux":
        prompt["encoders"] = node("DualCLIPLoader", clip_name1="clip_l.safetensors",
                                  clip_name2="t5xxl.safetensors", type="flux")  # fmt: skip
        text = node("CLIPTextEncode", text="a cat", clip=["encoders", 0])
    answers = said(server, an_edit(prompt, reference, picture, text))
    ours = [sentence for kind, sentence in answers if kind == "Omini2SpotEdit"]
    assert len(ours) == (sizes is not None)
    for sentence in ours:
        assert sentence.startswith(f"reset_steps - model: the first reference is {sizes}")


def test_the_host_s_size_for_kontext_is_known(server: Server, info: ObjectInfo) -> None:
    """A square of 512 becomes one of 1024."""
    prompt = prompt_of("try-it-without-a-checkpoint", info)
    (text,) = (each for each in prompt.values() if each["inputs"].get("text"))
    prompt = an_edit(prompt, 256, 512, text)
    prompt["scaled"] = node("FluxKontextImageScale", image=["reference pixels", 0])
    prompt["reference"]["inputs"]["pixels"] = ["scaled", 0]
    ((kind, sentence),) = said(server, prompt)
    assert kind == "Omini2SpotEdit"
    assert "the first reference is 1024x1024 and the picture 512x256" in sentence


@pytest.mark.parametrize("path", ALL_TEMPLATES, ids=lambda path: path.stem)
def test_nothing_but_missing_files_is_said_of_a_template(
    server: Server, info: ObjectInfo, path: Path
) -> None:
    for _, sentence in said(server, prompt_of(path.stem, info)):
        assert "there is no" in sentence or "not in" in sentence or "Invalid image file" in sentence

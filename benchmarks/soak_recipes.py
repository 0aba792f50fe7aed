"""What a soak draws: settings of every kind, drawn at random but the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dev.host.prompts import ObjectInfo, Prompt, combo_values
from dev.random_lora import make_lora

SIDES = 96, 128, 160  # pixels
SEEDS = 3  # of the noise, for each recipe
TEXTS = "a big red star on the left on a blue background", "a small ring", ""
MADE_LORAS = 3
KINDS = "edges", "depth", "subject", "compact", "pruned", "integration"


@dataclass(frozen=True)
class Job:
    """One run: a recipe's number and the noise's seed."""

    recipe: int
    seed: int


@dataclass(frozen=True)
class Recipe:
    """A graph's settings; a :class:`Job` adds the seed.

    Attributes:
        conditions: for each its kind, photo, LoRA, attention and condition_scale.
        cache: the widgets of Condition Cache; None leaves it out.
    """

    width: int
    height: int
    steps: int
    text: str
    cfg: float
    conditions: tuple[tuple[str, str, str, str, float], ...]
    cache: dict[str, Any] | None
    image_guidance: float

    @property
    def described(self) -> str:
        """In a few words."""
        kinds = "+".join(f"{kind} {attention}" for kind, _, _, attention, _ in self.conditions)
        reuse = "no cache" if self.cache is None else f"{self.cache['reuse']}"
        return f"{self.width}x{self.height}, {self.steps} steps, {kinds or 'plain'}, {reuse}"


def write_loras(folder: Path) -> None:
    """Random LoRAs of different sizes beside those that come with the extension."""
    for number in range(MADE_LORAS):
        make_lora(folder / f"soak_{number}.safetensors", rank=4 + 4 * number, seed=number)


def offered(info: ObjectInfo, node: str, name: str) -> list[str]:
    """What a node's list offers."""
    return list(combo_values(info[node]["input"]["required"][name]) or [])


def draw_recipes(count: int, seed: int, info: ObjectInfo) -> list[Recipe]:
    """The recipes of a soak; the kinds of condition take turns, so that all take part."""
    draw = random.Random(seed)
    photos = offered(info, "Omini2DemoImage", "photo")
    loras = offered(info, "Omini2ApplyLoRA", "lora_name")
    recipes = []
    for number in range(count):
        kinds = [KINDS[number % len(KINDS)]]
        if draw.random() < 0.5:
            kinds.append(draw.choice(KINDS[:-1]))  # a picture has one integration
        conditions = tuple(
            (
                kind,
                draw.choice(photos),
                draw.choice(loras),
                draw.choice(("joint", "independent")),
                draw.choice((1.0, 1.0, 0.7)),
            )
            for kind in kinds
        )
        cache = {
            "reuse": draw.choice(("auto", "once", "every_n_steps")),
            "refresh_every": 2,
            "storage": draw.choice(("model", "fp8")),
            "keep_on": draw.choice(("auto", "cpu")),
        }
        recipes.append(
            Recipe(
                width=draw.choice(SIDES),
                height=draw.choice(SIDES),
                steps=draw.randint(2, 4),
                text=draw.choice(TEXTS),
                cfg=draw.choice((1.0, 1.0, 2.0)),
                conditions=conditions,
                cache=draw.choice((cache, cache, None)),
                image_guidance=draw.choice((1.0, 1.0, 1.5)),
            )
        )
    return recipes


def draw_jobs(recipes: int, runs: int, seed: int) -> list[Job]:
    """Passes over all recipes, each in an order of its own."""
    draw = random.Random(seed + 1)
    jobs: list[Job] = []
    while len(jobs) < runs:
        order = list(range(recipes))
        draw.shuffle(order)
        jobs += [Job(recipe, draw.randrange(SEEDS)) for recipe in order]
    return jobs[:runs]


def prompt_of(recipe: Recipe, seed: int) -> Prompt:
    """The graph, as the editor would send it."""
    prompt: Prompt = {}

    def node(name: str, kind: str, **inputs: Any) -> list[Any]:
        prompt[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]

    node("demo", "Omini2DemoModel")
    model, clip, vae = (["demo", output] for output in range(3))
    positive = node("positive", "CLIPTextEncode", clip=clip, text=recipe.text)
    negative = node("negative", "ConditioningZeroOut", conditioning=positive)
    for number, condition in enumerate(recipe.conditions):
        model = _condition(node, recipe, number, condition, model, vae)
    if recipe.cache is not None:
        model = node("cache", "Omini2ConditionCache", model=model, **recipe.cache)
    if recipe.image_guidance != 1.0:
        model = node(
            "guidance",
            "Omini2ImageGuidance",
            model=model,
            image_guidance_scale=recipe.image_guidance,
        )
    latent = node(
        "empty", "EmptySD3LatentImage", width=recipe.width, height=recipe.height, batch_size=1
    )
    samples = node(
        "sampler", "KSampler", model=model, positive=positive, negative=negative,
        latent_image=latent, seed=seed, steps=recipe.steps, cfg=recipe.cfg, sampler_name="euler",
        scheduler="simple", denoise=1.0,
    )  # fmt: skip
    node("save", "SaveImage", images=node("decode", "VAEDecode", samples=samples, vae=vae),
         filename_prefix="soak")  # fmt: skip
    return prompt


def _condition(
    node: Any,
    recipe: Recipe,
    number: int,
    condition: tuple[str, str, str, str, float],
    model: Sequence[Any],
    vae: Sequence[Any],
) -> list[Any]:
    """A condition's nodes; gives the model with it."""
    kind, photo, lora, attention, scale = condition
    width, height = recipe.width, recipe.height
    image = node(
        f"scale {number}", "ImageScale", image=node(f"photo {number}", "Omini2DemoImage",
        photo=photo), upscale_method="area", width=width, height=height, crop="center",
    )  # fmt: skip
    if kind in ("edges", "compact", "pruned"):
        image = node(f"edges {number}", "Canny", image=image, low_threshold=0.1, high_threshold=0.3)
    placement = {"subject": "right", "depth": "fit"}.get(kind, "aligned")
    encoded = node(
        f"encode {number}", "Omini2ConditionEncode", image=image, vae=vae, placement=placement,
        delta_rows=0, delta_cols=0, position_scale=1.0,
    )  # fmt: skip
    compact: dict[str, Any] = {
        "compression": 0.5 if kind in ("compact", "depth") else 1.0,
        "prune": "empty" if kind == "pruned" else "off",
        "token_integration": kind == "integration",
    }
    if kind == "integration":
        compact["mask"] = _mask(node, number, width, height)
    if kind not in ("edges", "subject"):
        encoded = node(
            f"compact {number}", "Omini2CompactTokens", condition=encoded, position_correcting=True,
            threshold=0.1, grow=0, **compact,
        )  # fmt: skip
    return node(
        f"apply {number}", "Omini2ApplyLoRA", model=model, condition=encoded, lora_name=lora,
        strength=1.0, condition_scale=scale, attention=attention, start_percent=0.0,
        end_percent=1.0,
    )  # fmt: skip


def _mask(node: Any, number: int, width: int, height: int) -> list[Any]:
    """The middle of the picture, to be painted."""
    known = node(f"known {number}", "SolidMask", value=0.0, width=width, height=height)
    hole = node(
        f"hole {number}", "SolidMask", value=1.0, width=width // 32 * 16, height=height // 32 * 16
    )
    return node(
        f"mask {number}", "MaskComposite", destination=known, source=hole, x=16, y=16,
        operation="add",
    )  # fmt: skip

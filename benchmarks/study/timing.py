"""Where a step's time goes: attention or linear layers, for 1 to 8 conditions.

Imports the host: `benchmarks.host.start()` comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import costs

ATTENTION = ("scaled_dot_product", "flash_attention")
LINEAR = ("addmm", "aten::mm", "aten::bmm", "mkldnn", "onednn", "aten::linear", "aten::matmul")
COUNTS = (0, 1, 2, 3, 4, 6, 8)
MOST = 64  # conditions up to which the counted overtaking is looked for
LORA_RANK = 4
# hidden 768: a quarter of FLUX.1's width, and few of its blocks.
SHAPE = costs.Shape(768, 1, 2, text_width=1024, pooled_width=192)
QUICK = costs.Shape(256, 1, 1, text_width=64, pooled_width=32)


@dataclass(frozen=True)
class Split:
    """Seconds of one step of the model, and how many conditions it had."""

    model: str
    computed: str
    conditions: int
    attention: float
    linear: float
    other: float


def profiled(sample: Any) -> tuple[float, float, float]:
    """Seconds that a call spends in attention, in matrix products and in everything else."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        sample()
    seconds = {"attention": 0.0, "linear": 0.0, "other": 0.0}
    for event in prof.key_averages():
        name = event.key
        kind = "other"
        if any(part in name for part in ATTENTION):
            kind = "attention"
        elif any(part in name for part in LINEAR):
            kind = "linear"
        seconds[kind] += event.self_cpu_time_total / 1e6
    return seconds["attention"], seconds["linear"], seconds["other"]


def flux_shaped(quick: bool, repeats: int) -> list[Split]:
    """A FLUX of reduced width with conditions of the picture's size."""
    from benchmarks import flux

    shape, side, text = (QUICK, 8, 32) if quick else (SHAPE, 32, 512)
    with flux.lora_folder(shape, LORA_RANK):
        return _splits(
            "FLUX-shaped", (0, 1, 2) if quick else COUNTS, repeats, flux.model(shape),
            lambda model, attention: flux.with_condition(model, side, attention),
            lambda model, steps: flux.Task(shape, text, side, steps).timed(model),
        )  # fmt: skip


def demo_model(studio: Any, repeats: int, counts: Sequence[int] = COUNTS) -> list[Split]:
    """The demo model at 256x256 with edges as every condition."""
    import comfy.sample

    import omini2_extension.nodes as nodes
    from benchmarks.study.conditions import condition_images, truth
    from benchmarks.study.experiments import EDGES

    images = condition_images("edges", [truth(0)])
    condition = nodes.ConditionEncode.execute(images, studio.vae, "aligned", 0, 0, 1.0)[0]
    tokens = studio.clip.tokenize("a red circle")
    text, pooled = studio.clip.encode_from_tokens(tokens, return_pooled=True)
    prompt = [[text.float(), {"pooled_output": pooled.float(), "guidance": 3.5}]]
    latent = torch.zeros(1, 16, 32, 32)
    noise = comfy.sample.prepare_noise(latent, 0)

    def add(model: Any, attention: str) -> Any:
        values = condition, f"{EDGES}.safetensors", 1.0, 1.0, attention, 0.0, 1.0
        return nodes.ApplyLora.execute(model, *values)[0]

    def sample(model: Any, steps: int) -> None:
        comfy.sample.sample(model, noise, steps, 1.0, "euler", "simple", prompt, prompt, latent,
                            disable_pbar=True, seed=0)  # fmt: skip

    return _splits("demo model", counts, repeats, studio.model("bfloat16"), add, sample)


def _splits(
    name: str, counts: Sequence[int], repeats: int, plain: Any,
    add: Callable[[Any, str], Any], sample: Callable[[Any, int], Any],
) -> list[Split]:  # fmt: skip
    """Joint conditions at every step, and independent ones whose K/V are there already: a step is
    (three steps - one step) / 2, without what only a run's first step does. Of each kind the
    smallest of `repeats`, since other programs only ever add."""
    import omini2_extension.nodes as nodes

    found = []
    for computed, attention in (("every step", "joint"), ("once", "independent")):
        for count in counts:
            model = plain
            for _ in range(count):
                model = add(model, attention)
            if count and computed == "once":
                model = nodes.ConditionCache.execute(model, "once", 1, "model", "auto")[0]
            sample(model, 1)  # warm-up
            one, three = (
                zip(*(profiled(lambda: sample(model, n)) for _ in range(repeats)), strict=True)  # noqa: B023
                for n in (1, 3)
            )
            steady = (max(min(b) - min(a), 0.0) / 2 for a, b in zip(one, three, strict=True))
            found.append(Split(name, computed, count, *steady))
    return found


def counted(
    shape: costs.Shape, text: int, picture: int, tokens: int, count: int, computed: str
) -> tuple[int, int]:
    """FLOPs of one steady step in attention and in linear layers, by benchmarks/costs.py."""
    main = text + picture
    attention = shape.blocks * costs.attention_flops(shape, main, main + count * tokens)
    total = costs.plain_step(shape, text, picture)
    total += costs.extra_attention(shape, main, count * tokens)
    if computed == "every step":
        cost = costs.ConditionCost(tokens, joint=True, every=1, rank=LORA_RANK)
        total += count * costs.branch(shape, main, cost)
        attention += count * shape.blocks * costs.attention_flops(shape, tokens, main + tokens)
    return attention, total - attention


def overtakes(
    shape: costs.Shape, text: int, picture: int, tokens: int, computed: str
) -> int | None:
    """The fewest conditions with which attention takes more FLOPs than the linear layers."""
    for count in range(MOST + 1):
        attention, linear = counted(shape, text, picture, tokens, count, computed)
        if attention > linear:
            return count
    return None


def report(splits: list[Split]) -> dict[str, Any]:
    """Everything for JSON: measured splits, and what is counted for FLUX.1-dev."""
    predicted = []
    for size, picture in (("512x512", 1024), ("1024x1024", 4096)):
        for condition, tokens in (("512x512", 1024), ("1024x1024", 4096)):
            for computed in ("every step", "once"):
                shares = {
                    str(n): round(_share(*counted(costs.FLUX1_DEV, 512, picture, tokens, n,
                                                  computed)), 4)
                    for n in (0, 1, 2, 4, 8)
                }  # fmt: skip
                count = overtakes(costs.FLUX1_DEV, 512, picture, tokens, computed)
                predicted.append(
                    {"picture": size, "condition": condition, "computed": computed,
                     "attention_share": shares, "overtakes_at": count}
                )  # fmt: skip
    return {"measured": [asdict(s) for s in splits], "counted": predicted}


def _share(attention: float, linear: float) -> float:
    return attention / (attention + linear)

"""Many runs in one server: does its memory grow, does a picture depend on what came before?

`python -m benchmarks.soak` queues 500 runs with changing settings, cancels some, and prints what
docs/quality.md says of them. Every picture is drawn again in other servers, which have done nothing
before or something else, and has to be the same. The runs are also done without the conditions, in
a server of their own: what that grows by is ComfyUI's.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from scipy import stats
from tqdm import tqdm

from dev.host.prompts import ObjectInfo, Prompt, combo_values
from dev.host.server import Client, Interrupted, Server
from dev.random_lora import make_lora
from dev.workflows import demo

CANCELLED = 0.1  # share of the runs
SIDES = 96, 128, 160  # pixels
SEEDS = 3  # of the noise, for each graph
TEXTS = "a big red star on the left on a blue background", "a small ring", ""
KINDS = "edges", "depth", "subject", "compact", "pruned", "integration"
WARM_UP = 3  # passes over all graphs: every graph has run then, and its K/V are kept
BOUND = 1.0  # MB in 100 runs: 10,000 pictures then take less than one of FLUX.1's LoRAs


class Job(NamedTuple):
    """One run: a graph's number and the noise's seed."""

    graph: int
    seed: int


def draw_graphs(count: int, seed: int, info: ObjectInfo) -> list[Prompt]:
    """The soak's graphs; the kinds of condition take turns, so that all take part."""
    draw = random.Random(seed)
    graphs = []
    for number in range(count):
        kinds = [KINDS[number % len(KINDS)]]
        if draw.random() < 0.5:
            kinds.append(draw.choice(KINDS[:-1]))  # a picture has one integration
        graphs.append(draw_graph(draw, kinds, info))
    return graphs


def draw_graph(draw: random.Random, kinds: list[str], info: ObjectInfo) -> Prompt:
    """One with conditions of these kinds, as the editor would send it."""
    prompt: Prompt = {}

    def node(kind: str, **inputs: Any) -> list[Any]:
        name = f"{len(prompt)}"
        prompt[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]

    def offered(kind: str, name: str) -> str:
        values = combo_values(info[kind]["input"]["required"][name])
        # The demo model's LoRAs for edits are no condition's; Apply Omini2 LoRA refuses them.
        other = "(none)", "omini2_demo_edit_"
        return draw.choice([each for each in values if not each.startswith(other)])

    model = node("Omini2DemoModel")
    clip, vae = [model[0], 1], [model[0], 2]
    size = {"width": draw.choice(SIDES), "height": draw.choice(SIDES)}
    positive = node("CLIPTextEncode", clip=clip, text=draw.choice(TEXTS))
    negative = node("ConditioningZeroOut", conditioning=positive)
    for kind in kinds:
        image = node("Omini2DemoImage", photo=offered("Omini2DemoImage", "photo"))
        image = node("ImageScale", image=image, upscale_method="area", crop="center", **size)
        if kind in ("edges", "compact", "pruned"):
            image = node("Canny", image=image, low_threshold=0.1, high_threshold=0.3)
        place = {"subject": "right", "depth": "fit"}.get(kind, "aligned")
        made = node("Omini2ConditionEncode", image=image, vae=vae, placement=place, delta_rows=0,
                    delta_cols=0, position_scale=1.0)  # fmt: skip
        mask = {}
        if kind == "integration":  # the middle of the picture is painted
            known = node("SolidMask", value=0.0, **size)
            hole = node("SolidMask", value=1.0, **{k: v // 32 * 16 for k, v in size.items()})
            mask["mask"] = node("MaskComposite", destination=known, source=hole, x=16, y=16,
                                operation="add")  # fmt: skip
        if kind not in ("edges", "subject"):
            made = node(
                "Omini2CompactTokens", condition=made, position_correcting=True, threshold=0.1,
                grow=0, compression=0.5 if kind in ("compact", "depth") else 1.0,
                prune="empty" if kind == "pruned" else "off",
                token_integration=kind == "integration", **mask,
            )  # fmt: skip
        model = node(
            "Omini2ApplyLoRA", model=model, condition=made, strength=1.0,
            lora_name=offered("Omini2ApplyLoRA", "lora_name"),
            condition_scale=draw.choice((1.0, 1.0, 0.7)), start_percent=0.0, end_percent=1.0,
            attention=draw.choice(("joint", "independent")),
        )  # fmt: skip
    if draw.random() < 0.7:
        model = node(
            "Omini2ConditionCache", model=model, refresh_every=2,
            reuse=draw.choice(("auto", "once", "every_n_steps")),
            storage=draw.choice(("model", "fp8")), keep_on=draw.choice(("auto", "cpu")),
        )  # fmt: skip
    if draw.random() < 0.3:
        model = node("Omini2ImageGuidance", model=model, image_guidance_scale=1.5)
    latent = node("EmptySD3LatentImage", batch_size=1, **size)
    prompt["sampler"] = {"class_type": "KSampler", "inputs": {
        "model": model, "positive": positive, "negative": negative, "latent_image": latent,
        "seed": 0, "denoise": 1.0, "steps": draw.randint(2, 4), "cfg": draw.choice((1.0, 1.0, 2.0)),
        "sampler_name": "euler", "scheduler": "simple",
    }}  # fmt: skip
    pictures = node("VAEDecode", samples=["sampler", 0], vae=vae)
    node("SaveImage", images=pictures, filename_prefix="soak")
    return prompt


def draw_jobs(graphs: int, runs: int, seed: int) -> list[Job]:
    """Passes over all graphs, each in an order of its own."""
    draw, jobs = random.Random(seed + 1), []
    while len(jobs) < runs:
        jobs += [Job(graph, draw.randrange(SEEDS)) for graph in draw.sample(range(graphs), graphs)]
    return jobs[:runs]


async def picture(client: Client, graph: Prompt, seed: int, cancel: bool = False) -> str | None:
    """A digest of the picture's pixels; None if it was cancelled before it was done."""
    graph["sampler"]["inputs"]["seed"] = seed
    pressed: list[asyncio.Future[None]] = []

    def step() -> None:
        if cancel and not pressed:
            pressed.append(asyncio.ensure_future(client.interrupt()))

    try:
        outcome = await client.run(graph, step)
    except Interrupted:
        return None
    finally:
        await asyncio.gather(*pressed)
    drawn = await demo.picture_of(client, graph, outcome)
    return hashlib.sha256(repr(drawn.size).encode() + drawn.tobytes()).hexdigest()


def on_a_server(
    folder: Path, options: Any, jobs: Sequence[Job], cancels: Sequence[bool], plain: bool = False
) -> tuple[list[str | None], list[int]]:
    """Each job's picture in a new server, and the server's memory after it in bytes."""
    for number in range(3):  # beside the LoRAs that come with the extension
        file = folder / "base" / "models" / "loras" / f"soak_{number}.safetensors"
        make_lora(file, rank=4 + 4 * number, seed=number)

    async def run_all(running: Server) -> tuple[list[str | None], list[int]]:
        process, digests, rss = psutil.Process(running.pid), [], []
        async with Client(running) as client:
            graphs = draw_graphs(options.graphs, options.seed, await client.object_info())
            graphs = [demo.without_conditions(each) for each in graphs] if plain else graphs
            for job, cancel in tqdm(list(zip(jobs, cancels, strict=True)), unit="run", ncols=90):
                digests.append(await picture(client, graphs[job.graph], job.seed, cancel))
                await client.clear_history()
                rss.append(process.memory_info().rss)
        return digests, rss

    with Server(folder / "base", folder / "server.log") as running:
        return asyncio.run(run_all(running))


def drawn_again(folder: Path, options: Any, jobs: list[Job]) -> dict[Job, str | None]:
    """The pictures of different jobs, `--fresh` of them each in a server that has drawn nothing
    before, the others in one server in the opposite order."""
    alone = random.Random(options.seed + 2).sample(jobs, min(options.fresh, len(jobs)))
    groups = [[job] for job in alone] + [[job for job in reversed(jobs) if job not in alone]]
    found: dict[Job, str | None] = {}
    for number, group in enumerate(filter(None, groups)):
        digests, _ = on_a_server(folder / f"{number}", options, group, [False] * len(group))
        found |= dict(zip(group, digests, strict=True))
    return found


class Slope(NamedTuple):
    """MB that memory grows by in 100 runs, the 95 % confidence interval, the means behind it."""

    value: float
    low: float
    high: float
    points: int

    @property
    def flat(self) -> bool:
        """No growth, or none that could matter."""
        return self.low <= 0 <= self.high or self.high < BOUND

    def __str__(self) -> str:
        said = f"{self.value:+.2f} MB per 100 runs ({self.low:+.2f} to {self.high:+.2f})"
        return f"{said}, **{'flat' if self.flat else 'not flat'}**"


def slope(rss: Sequence[int], per_pass: int) -> Slope:
    """Fits a line to what a server held after each run, in bytes, once it is warm.

    Each point is the mean over a pass: all passes hold the same graphs, in different orders, so
    their means can be compared, and are far enough apart to be independent.

    Raises:
        ValueError: fewer than three whole passes after the warm-up.
    """
    passes = len(rss) // per_pass
    warm = np.reshape(rss[: passes * per_pass], (passes, per_pass)).mean(1)[WARM_UP:] / 1e6
    if len(warm) < 3:
        raise ValueError(f"{len(rss)} runs are {passes} passes; a slope takes {WARM_UP + 3}.")
    fit = stats.linregress(np.arange(len(warm)) * per_pass / 100, warm)
    margin = float(stats.t.ppf(0.975, len(warm) - 2) * fit.stderr)
    return Slope(float(fit.slope), float(fit.slope) - margin, float(fit.slope) + margin, len(warm))


def main() -> int:
    """1 where memory isn't flat or a picture differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--graphs", type=int, default=50, help="different graphs")
    parser.add_argument("--fresh", type=int, default=40, help="runs with a server of their own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.runs < (WARM_UP + 3) * options.graphs:
        parser.error(f"--runs: take at least {WARM_UP + 3} for each of the --graphs")
    jobs, draw = draw_jobs(options.graphs, options.runs, options.seed), random.Random(options.seed)
    cancels = [draw.random() < CANCELLED for _ in jobs]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        digests, rss = on_a_server(folder / "soaked", options, jobs, cancels)
        _, without = on_a_server(folder / "without", options, jobs, cancels, plain=True)
        done = [(job, digest) for job, digest in zip(jobs, digests, strict=True) if digest]
        again = drawn_again(folder, options, list(dict.fromkeys(job for job, _ in done)))
    different = [job for job, digest in done if digest != again[job]]
    added = slope([a - b for a, b in zip(rss, without, strict=True)], options.graphs)
    print(f"- {len(jobs)} runs of {options.graphs} graphs, {len(jobs) - len(done)} cancelled")
    print(f"- the server's memory: {slope(rss, options.graphs)}, {added.points} means of a pass")
    print(f"- without the conditions: {slope(without, options.graphs)}")
    print(f"- what the conditions add: {added}")
    print(f"- {len(done)} pictures compared with other servers' ({len(again)} different ones), "
          f"{len(different)} differ: {different}")  # fmt: skip
    return 0 if added.flat and not different else 1


if __name__ == "__main__":
    sys.exit(main())

"""Many runs in one server: does its memory grow, does a picture depend on what came before?

`python -m benchmarks.soak` queues 500 runs with changing settings, cancels some, and writes
docs/soak.md. Every picture is drawn again in other servers, which have done nothing before or
something else, and has to be the same. The runs are also done without the conditions, in a server
of their own: what that grows by is ComfyUI's.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from benchmarks import host, soak_report
from benchmarks.soak_recipes import (
    Job,
    Recipe,
    draw_jobs,
    draw_recipes,
    prompt_of,
    write_loras,
)
from dev.host.server import Client, Interrupted, Server
from dev.paths import ROOT
from dev.workflows import demo

RECIPES = 50
FRESH = 40  # runs that are drawn again in a server of their own
CANCELLED = 0.1  # share of the runs
IMAGE = "images/soak.png"


class Pictures:
    """Draws jobs on a server and names what came out."""

    def __init__(self, client: Client, recipes: list[Recipe], conditions: bool = True) -> None:
        self._client, self._recipes, self._conditions = client, recipes, conditions

    async def draw(self, job: Job, cancel: bool = False) -> str | None:
        """A digest of the picture's pixels; None if it was cancelled before it was done."""
        prompt = prompt_of(self._recipes[job.recipe], job.seed)
        if not self._conditions:
            prompt = demo.without_conditions(prompt)
        pressed: list[asyncio.Future[None]] = []

        def step() -> None:
            if cancel and not pressed:
                pressed.append(asyncio.ensure_future(self._client.interrupt()))

        try:
            outcome = await self._client.run(prompt, step)
        except Interrupted:
            return None
        finally:
            await asyncio.gather(*pressed)
        picture = await demo.picture_of(self._client, prompt, outcome)
        return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def server(folder: Path) -> Server:
    """A new server with the soak's LoRAs, on a folder of its own."""
    write_loras(folder / "base" / "models" / "loras")
    return Server(folder / "base", folder / "server.log")


async def recipes_of(running: Server, count: int, seed: int) -> list[Recipe]:
    """The soak's recipes, from what this server offers."""
    async with Client(running) as client:
        return draw_recipes(count, seed, await client.object_info())


async def run_all(
    running: Server,
    recipes: list[Recipe],
    jobs: list[Job],
    cancels: list[bool],
    conditions: bool = True,
) -> tuple[list[str | None], list[int]]:
    """Each job's picture, and the server's memory after it in bytes."""
    process = psutil.Process(running.pid)
    digests, rss = [], []
    async with Client(running) as client:
        pictures = Pictures(client, recipes, conditions)
        for job, cancel in tqdm(list(zip(jobs, cancels, strict=True)), unit="run", ncols=90):
            digests.append(await pictures.draw(job, cancel))
            await client.clear_history()
            rss.append(process.memory_info().rss)
    return digests, rss


async def draw_again(running: Server, recipes: list[Recipe], jobs: Iterable[Job]) -> dict[Job, str]:
    """The pictures of jobs, in this order."""
    async with Client(running) as client:
        pictures = Pictures(client, recipes)
        return {job: str(await pictures.draw(job)) for job in jobs}


def reference(
    folder: Path, recipes: list[Recipe], jobs: list[Job], fresh: int, seed: int
) -> dict[Job, str]:
    """The pictures of different jobs in servers that have drawn little else, or nothing."""
    alone = set(random.Random(seed + 2).sample(jobs, min(fresh, len(jobs))))
    groups = [[job] for job in jobs if job in alone]
    groups.append([job for job in reversed(jobs) if job not in alone])
    found: dict[Job, str] = {}
    for number, group in enumerate(tqdm(groups, unit="server", ncols=90)):
        if group:
            with server(folder / f"other_{number}") as running:
                found |= asyncio.run(draw_again(running, recipes, group))
    return found


def soak(runs: int, recipes: int, fresh: int, seed: int, folder: Path) -> dict[str, Any]:
    """Runs it all.

    Args:
        runs: how many, cancelled ones included.
        recipes: how many different graphs.
        fresh: how many different runs are drawn again in a server of their own.
        folder: for the servers' files.
    """
    jobs = draw_jobs(recipes, runs, seed)
    draw = random.Random(seed + 3)
    cancels = [draw.random() < CANCELLED for _ in jobs]
    began = time.monotonic()
    with server(folder / "soaked") as running:
        drawn_from = asyncio.run(recipes_of(running, recipes, seed))
        digests, rss = asyncio.run(run_all(running, drawn_from, jobs, cancels))
    minutes = (time.monotonic() - began) / 60
    with server(folder / "without") as running:
        _, rss_without = asyncio.run(run_all(running, drawn_from, jobs, cancels, False))
    done = list(dict.fromkeys(j for j, d in zip(jobs, digests, strict=True) if d is not None))
    wanted = reference(folder, drawn_from, done, fresh, seed)
    different = [
        number
        for number, (job, digest) in enumerate(zip(jobs, digests, strict=True), 1)
        if digest is not None and digest != wanted[job]
    ]
    return {
        "seed": seed,
        "recipes": recipes,
        "graphs": [recipe.described for recipe in drawn_from],
        "jobs": [
            {**asdict(job), "cancelled": digest is None}
            for job, digest in zip(jobs, digests, strict=True)
        ],
        "rss": rss,
        "rss_without": rss_without,
        "fresh": min(fresh, len(done)),
        "others": max(len(done) - fresh, 0),
        "different": different,
        "minutes": minutes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--recipes", type=int, default=RECIPES, help="different graphs")
    parser.add_argument("--fresh", type=int, default=FRESH, help="runs with a server of their own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="for soak.md")
    parser.add_argument("--json", type=Path, help="keep everything that was measured")
    args = parser.parse_args()
    if args.runs < (soak_report.WARM_UP + 3) * args.recipes:
        parser.error(f"--runs: take at least {soak_report.WARM_UP + 3} for each of the --recipes")
    with tempfile.TemporaryDirectory() as folder:
        results = soak(args.runs, args.recipes, args.fresh, args.seed, Path(folder))
    host.start("cpu")
    results["machine"] = host.machine()
    results["command"] = shlex.join(["python", "-m", "benchmarks.soak", *sys.argv[1:]])
    grown = soak_report.slope(results["rss"], args.recipes)
    results["slope"] = asdict(grown)
    without = soak_report.slope(results["rss_without"], args.recipes)
    results["slope_without"] = asdict(without)
    added = soak_report.slope_apart(results["rss"], results["rss_without"], args.recipes)
    results["slope_of_conditions"] = asdict(added)
    if args.json:
        args.json.write_text(json.dumps(results), encoding="utf-8")
    soak_report.plot(results, args.output / IMAGE)
    text = soak_report.page(results, IMAGE)
    (args.output / "soak.md").write_text(text, encoding="utf-8", newline="\n")
    print(text)
    return 0 if added.flat and not results["different"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""What kept references save on editing models: `python -m benchmarks.references`.

Each figure is the plain model's time over that of a run with Condition Cache, next to the same
ratio of FLOPs. `--counted` counts on the real models' shapes, without weights, and takes seconds;
`--model NAME` measures one of the small ones. FLOPs are those that PyTorch counts in the host's own
forward; what text and picture pay for kept keys is added by formula.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import host
from benchmarks.editing import HEAD, Kind, models
from benchmarks.side_by_side import Timing, alternate, keep, parser
from dev.markdown import table

COUNTS, STEPS, EVERY = (1, 2, 4), (4, 28), 5
WAYS = ("once", "every 5", "compact 0.5", "both")  # both: compact and once
SECOND, HOSTS = "isolated, second seed", "Flux KV Cache"  # of which the latter is ComfyUI's own
TEXT, SIDE = 64, 32  # of the small models: a picture of 1024 tokens
# Of the ways and steps, those that differ.
TOLD = (("once", 4), ("once", 28), ("every 5", 28), ("compact 0.5", 28), ("both", 4), ("both", 28))
FULL_TEXT, FULL_SIDE = 512, 64  # 1024x1024 pixels


class Counted:
    """FLOPs of a model of this shape, which has no weights."""

    def __init__(self, kind: Kind, text: int, side: int) -> None:
        from benchmarks import flux
        from omini2_extension.omini2_core.host.references import family_of

        self.kind, self.text, self.side = kind, max(text, kind.padded), side
        patcher = flux.built(kind.kind, kind.config, None, torch.device("meta"))
        self.model = patcher.model.diffusion_model
        family = family_of(patcher)
        assert family is not None
        self.kv_numbers = family.kv_bytes_per_token(patcher) // flux.dtype().itemsize  # of a token
        self.blocks = len(family.numbers(self.model))
        known = kind.config.get("num_heads") or kind.config.get("num_attention_heads")
        self.width = HEAD * (known or self.model.heads)  # of the queries
        self._step: dict[tuple[int, ...], int] = {}

    def step(self, sides: Sequence[int] = ()) -> int:
        """One evaluation of the host's forward with references of these sides."""
        if tuple(sides) not in self._step:
            kind, one = self.kind, torch.ones(1, device="meta")
            x = kind.latent(self.side, "meta")
            given = dict(kind.options)
            if "guidance_embed" in kind.config:
                given["guidance"] = one
            if kind.config.get("vec_in_dim"):
                given["y"] = torch.ones(1, kind.config["vec_in_dim"], device="meta")
            if sides:
                given["ref_latents"] = [kind.latent(side, "meta") for side in sides]
            context = torch.randn(1, self.text, kind.text, device="meta")
            with FlopCounterMode(display=False) as counter:
                self.model._forward(x, one, context, transformer_options={}, **given)
            self._step[tuple(sides)] = counter.get_total_flops()
        return self._step[tuple(sides)]

    def run(self, way: str, count: int, steps: int) -> int:
        """A run with one evaluation a step."""
        compact = way in ("compact 0.5", "both")
        sides = [self.side // 2 if compact else self.side] * count
        if way in ("plain", "compact 0.5"):
            return steps * self.step(sides)
        refreshes = {"every 5": -(-steps // EVERY), SECOND: 0}.get(way, 1)
        keys = sum(side**2 for side in sides)
        appended = self.blocks * 4 * (self.text + self.side**2) * keys * self.width
        return refreshes * self.step(sides) + (steps - refreshes) * (self.step() + appended)

    def ratio(self, way: str, count: int, steps: int) -> float:
        """The plain model's over those of a run."""
        return self.run("plain", count, steps) / self.run(way, count, steps)


def counted() -> str:
    """The table of the real models."""
    rows = []
    for name, kind in models(small=False).items():
        of = Counted(kind, FULL_TEXT, FULL_SIDE)
        for count in COUNTS:
            size = count * FULL_SIDE**2 * of.kv_numbers * 2 / 2**30
            ratios = (f"{of.ratio(way, count, steps):.2f}" for way, steps in TOLD)
            rows.append([name, str(count), *ratios, f"{size:.1f} GiB"])
    head = [f"{way}, {steps} steps" for way, steps in TOLD]
    return table(["model", "references", *head, "K/V"], rows)


class Bench:
    """One small model, timed as the stock sampler runs it."""

    def __init__(self, kind: Kind, side: int = SIDE) -> None:
        from benchmarks import flux

        self.kind, self.side = kind, side
        self.model = flux.built(kind.kind, kind.config, None, flux.device())

    @property
    def ways(self) -> list[str]:
        """All that this host can do on this model."""
        import comfy_extras.nodes_flux as host_nodes

        hosts = hasattr(host_nodes, "FluxKVCache") and self.kind.kind != "Flux"
        return [*WAYS, SECOND, *([HOSTS] if hosts else [])]

    def cached(self, way: str) -> Any:
        """The MODEL of a way."""
        from omini2_extension.nodes import ConditionCache

        if way in ("plain", "compact 0.5"):
            return self.model
        if way == HOSTS:
            from comfy_extras.nodes_flux import FluxKVCache

            return FluxKVCache.execute(self.model)[0]
        how = "every_n_steps" if way == "every 5" else "once", EVERY, "model", "gpu"
        references = "isolated" if way == SECOND else "joint"
        return ConditionCache.execute(self.model, *how, references)[0]

    def timed(self, model: Any, way: str, count: int, steps: int) -> Timing:
        """Samples once, cfg 1."""
        import comfy.model_management
        import comfy.sample

        kind = self.kind
        side = self.side // 2 if way in ("compact 0.5", "both") else self.side
        draw = torch.random.manual_seed(0)
        text = torch.randn(1, TEXT, kind.text, generator=draw)
        references = [kind.latent(side) for _ in range(count)]
        said = {"reference_latents": references, "pooled_output": torch.ones(1, 64)}
        latent, prompt = (
            torch.zeros_like(kind.latent(self.side)),
            [[text, {"guidance": 3.5, **said}]],
        )
        noise = comfy.sample.prepare_noise(latent, 0)
        comfy.model_management.load_models_gpu([model])  # in place of the other way's MODEL
        clock, processor = time.perf_counter(), time.process_time()
        comfy.sample.sample(
            model, noise, steps, 1.0, "euler", "simple", prompt, prompt, latent,
            disable_pbar=True, seed=0,
        )  # fmt: skip
        return Timing(time.perf_counter() - clock, time.process_time() - processor)

    def figures(self, of: Counted, count: int, steps: int, repeats: int) -> list[dict[str, Any]]:
        """All ways over plain, runs alternating."""
        runs: list[Callable[[], Timing]] = []
        for way in self.ways:
            model = self.cached(way)
            self.timed(model, way, count, 2)  # warm-up, and the first seed
            runs.append(lambda model=model, way=way: self.timed(model, way, count, steps))
        base = lambda: self.timed(self.model, "plain", count, steps)  # noqa: E731
        base()
        _, found = alternate(base, runs, repeats)
        return [
            {
                "way": way, "count": count, "steps": steps,
                "processor": [1 / r for r in each.values(False)],
                "clock": [1 / r for r in each.values(True)],
                "flops": of.ratio("once" if way == HOSTS else way, count, steps),
            }
            for way, each in zip(self.ways, found, strict=True)
        ]  # fmt: skip


def table_of(results: Sequence[dict[str, Any]]) -> str:
    """What was measured: by processor time, and its share of the FLOP ratio."""
    found: dict[tuple[Any, ...], dict[str, str]] = {}
    for f in (figure for each in results for figure in each["figures"]):
        ratio = statistics.median(f["processor"])
        cell = f"**{ratio:.2f}** ({ratio / f['flops']:.2f})"
        found.setdefault((f["model"], f["count"], f["steps"]), {})[f["way"]] = cell
    ways = [*WAYS, SECOND, HOSTS]
    rows = [[*map(str, key), *(cells.get(w, "-") for w in ways)] for key, cells in found.items()]
    return table(["model", "references", "steps", *ways], rows)


def section(results: Sequence[dict[str, Any]]) -> str:
    """The page's part on references."""
    parts = ["## References of editing models"]
    measured = [each for each in results if each["figures"]]
    if measured:
        parts += [
            "How many times as fast as the plain model, with K/V of references kept: by processor "
            "time, and in brackets as a share of the same ratio of FLOPs. Small models of random "
            f"weights, {measured[0]['side'] ** 2} tokens in the picture and in each reference: "
            "`.venv/bin/python -m benchmarks.references --json FILE`. *compact 0.5*: references at "
            "half the side and no cache; *both*: these, computed once; *Flux KV Cache*: ComfyUI's "
            "own node, which fails on FLUX.1. Medians of alternating runs.",
            table_of(measured),
            *map(_where, measured),
        ]
    parts += [
        "Counted on the real models' shapes, 1024x1024 pixels and as large references, "
        f"{FULL_TEXT} text tokens, 16-bit K/V of one prompt at full size (a quarter of that with "
        "*both*): `.venv/bin/python -m benchmarks.references --counted --json FILE`.",
        *(each["references"] for each in results if each["references"]),
    ]
    return "\n\n".join(parts)


def _where(results: dict[str, Any]) -> str:
    """On what machine its models were measured, and how often."""
    names = ", ".join(dict.fromkeys(f["model"] for f in results["figures"]))
    runs = sorted({len(f["processor"]) for f in results["figures"]})
    return (
        f"{names}: {results['machine']}; load average {results['load'][1]:.1f}; runs of each: "
        f"{' or '.join(map(str, runs))}."
    )


def main() -> None:
    """Command line."""
    of = parser(__doc__, steps=28)
    of.add_argument("--counted", action="store_true", help="only count, on the real shapes")
    of.add_argument("--model", choices=("FLUX.1", "FLUX.2", "Qwen"), action="append")
    of.add_argument("--side", type=int, default=SIDE, help="tokens of the picture's side")
    options, load = of.parse_args(), os.getloadavg()[0]
    host.start(options.device)
    torch.set_num_threads(1)
    with torch.inference_mode():
        results: dict[str, Any] = {
            "machine": host.machine(), "side": options.side, "figures": [], "references": "",
        }  # fmt: skip
        if options.counted:
            results["references"] = counted()
            keep(options.json, results)
            print(results["references"])
            return
        for name, kind in models(small=True).items():
            if name not in (options.model or [name]):
                continue
            bench, counts = Bench(kind, options.side), Counted(kind, TEXT, options.side)
            for steps, count in ((s, n) for s in STEPS for n in COUNTS if s <= options.steps):
                print(f"{name}: {count} references, {steps} steps", file=sys.stderr, flush=True)
                repeats = max(1, options.repeats * STEPS[0] // steps)
                found = bench.figures(counts, count, steps, repeats)
                results["figures"] += [{"model": name, **figure} for figure in found]
                results["load"] = [load, os.getloadavg()[0]]
                keep(options.json, results)
    print(table_of([results]))


if __name__ == "__main__":
    main()

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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import host
from benchmarks.side_by_side import Timing, alternate, keep, parser, spread
from dev.markdown import table

COUNTS, STEPS, EVERY = (1, 2, 4), (4, 28), 5
WAYS = ("once", "every 5", "compact 0.5", "both")  # both: compact and once
HEAD, TEXT, SIDE = 128, 64, 16  # of the small models: a picture of 256 tokens
FULL_TEXT, FULL_SIDE = 512, 64  # 1024x1024 pixels


@dataclass(frozen=True)
class Kind:
    """An editing model.

    Attributes:
        kind, config: its class in ``comfy.supported_models``, and the host's words for its sizes.
        text: width of a text token.
        channels, side, video: of its latents, as in the tests' tiny models.
        padded: tokens that a shorter prompt is brought to.
    """

    kind: str
    config: dict[str, Any]
    text: int
    channels: int = 16
    side: int = 2
    video: bool = False
    padded: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def latent(self, side: int, device: str = "cpu") -> torch.Tensor:
        """Of side x side tokens."""
        sides = [side * self.side] * 2
        return torch.randn(1, self.channels, *([1] if self.video else []), *sides, device=device)


def flux2(heads: int, double: int, single: int, text: int, guided: bool = False) -> Kind:
    """FLUX.2 of so many heads and blocks."""
    from benchmarks.flux import text_ids

    config = {
        "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None,
        "context_in_dim": text, "hidden_size": heads * HEAD, "mlp_ratio": 3.0, "num_heads": heads,
        "depth": double, "depth_single_blocks": single, "axes_dim": [32] * 4, "theta": 2000,
        "patch_size": 1, "qkv_bias": False, "guidance_embed": guided, "global_modulation": True,
        "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index",
        "ref_index_scale": 10.0, **text_ids([3]),
    }  # fmt: skip
    return Kind("Flux2", config, text, channels=128, side=1, padded=512)


def qwen(heads: int, blocks: int, text: int) -> Kind:
    """Qwen-Image-Edit of so many heads and blocks."""
    config = {
        "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": blocks,
        "attention_head_dim": HEAD, "num_attention_heads": heads, "joint_attention_dim": text,
        "axes_dims_rope": (16, 56, 56),
    }  # fmt: skip
    return Kind("QwenImage", config, text, video=True)


def models(small: bool) -> dict[str, Kind]:
    """The small ones to be timed, or the real ones; those that this host has."""
    from comfy import supported_models

    from benchmarks import costs, flux

    if small:
        shape = costs.Shape(3 * HEAD, 1, 2, text_width=256, pooled_width=64)
        return {
            "FLUX.1": Kind("Flux", flux.config(shape), 256),
            "FLUX.2": flux2(3, 1, 2, 256),
            "Qwen": qwen(3, 3, 256),
        }
    found = {
        "FLUX.1 Kontext": Kind("Flux", flux.config(costs.FLUX1_DEV), 4096),
        "FLUX.2 dev": flux2(48, 8, 48, 15360, guided=True),
        "FLUX.2 klein 9B": flux2(32, 8, 24, 12288),
        "FLUX.2 klein 4B": flux2(24, 5, 20, 7680),
        "Qwen-Image-Edit": qwen(24, 60, 3584),
    }
    if hasattr(supported_models, "Krea2"):
        at_zero = {"ref_latents_method": "index_timestep_zero"}
        krea = Kind("Krea2", {"image_model": "krea2"}, 12 * 2560, video=True, options=at_zero)
        found["Krea 2"] = krea
    return found


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
        refreshes = -(-steps // EVERY) if way == "every 5" else 1
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
            ratios = (f"{of.ratio(way, count, steps):.2f}" for way in WAYS for steps in STEPS)
            rows.append([name, str(count), *ratios, f"{size:.1f} GiB"])
    head = [f"{way}, {steps} steps" for way in WAYS for steps in STEPS]
    return table(["model", "references", *head, "K/V"], rows)


class Bench:
    """One small model, timed as the stock sampler runs it."""

    def __init__(self, kind: Kind) -> None:
        from benchmarks import flux

        self.kind = kind
        self.model = flux.built(kind.kind, kind.config, None, flux.device())

    def cached(self, way: str, references: str = "joint") -> Any:
        """The MODEL of a way."""
        from omini2_extension.nodes import ConditionCache

        if way in ("plain", "compact 0.5"):
            return self.model
        if way == "Flux KV Cache":
            from comfy_extras.nodes_flux import FluxKVCache

            return FluxKVCache.execute(self.model)[0]
        reuse = "every_n_steps" if way == "every 5" else "once"
        return ConditionCache.execute(self.model, reuse, EVERY, "model", "gpu", references)[0]

    def timed(self, model: Any, way: str, count: int, steps: int, forget: bool = True) -> Timing:
        """Samples once, cfg 1."""
        import comfy.model_management
        import comfy.sample

        from benchmarks import flux

        if forget:
            flux.forget(model)
        kind = self.kind
        side = SIDE // 2 if way in ("compact 0.5", "both") else SIDE
        draw = torch.random.manual_seed(0)
        text = torch.randn(1, TEXT, kind.text, generator=draw)
        references = [kind.latent(side) for _ in range(count)]
        said = {"reference_latents": references, "pooled_output": torch.ones(1, 64)}
        latent, prompt = torch.zeros_like(kind.latent(SIDE)), [[text, {"guidance": 3.5, **said}]]
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
        ways = [*WAYS, *(["Flux KV Cache"] if has_host_cache(self.kind) else [])]
        runs: list[Callable[[], Timing]] = []
        for way in ways:
            model = self.cached(way)
            self.timed(model, way, count, 2)  # warm-up
            runs.append(lambda model=model, way=way: self.timed(model, way, count, steps))
        base = lambda: self.timed(self.model, "plain", count, steps)  # noqa: E731
        base()
        _, found = alternate(base, runs, repeats)
        return [
            {
                "way": way, "count": count, "steps": steps,
                "processor": [1 / r for r in each.values(False)],
                "clock": [1 / r for r in each.values(True)],
                "flops": of.ratio("once" if way == "Flux KV Cache" else way, count, steps),
            }
            for way, each in zip(ways, found, strict=True)
        ]  # fmt: skip

    def second_seed(self) -> list[int]:
        """References that each call of the model's forward has in an isolated second seed."""
        model, inner = self.cached("once", "isolated"), self.model.model.diffusion_model
        self.timed(model, "once", 1, 4)
        calls: list[int] = []
        hook = inner.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(len(kwargs.get("ref_latents") or ())),
            with_kwargs=True,
        )
        self.timed(model, "once", 1, 4, forget=False)
        hook.remove()
        return calls


def has_host_cache(kind: Kind) -> bool:
    """Whether this host has a node of its own that works on a model."""
    import comfy_extras.nodes_flux as host_nodes

    return hasattr(host_nodes, "FluxKVCache") and kind.kind != "Flux"


def table_of(results: dict[str, Any]) -> str:
    """What was measured."""
    rows = []
    for f in results["figures"]:
        over = statistics.median(f["processor"]) / f["flops"]
        rows.append([
            f["model"], str(f["count"]), str(f["steps"]), f["way"], spread(f["processor"]),
            spread(f["clock"]), f"{f['flops']:.2f}", f"{over:.2f}",
        ])  # fmt: skip
    head = ("model", "references", "steps", "way", "by processor time", "by the clock", "FLOPs",
            "of the FLOPs")  # fmt: skip
    return table(head, rows)


def main() -> None:
    """Command line."""
    of = parser(__doc__, steps=28)
    of.add_argument("--counted", action="store_true", help="only count, on the real shapes")
    of.add_argument("--model", choices=("FLUX.1", "FLUX.2", "Qwen"), action="append")
    options, load = of.parse_args(), os.getloadavg()[0]
    host.start(options.device)
    torch.set_num_threads(1)
    with torch.inference_mode():
        if options.counted:
            print(counted())
            return
        results: dict[str, Any] = {"machine": host.machine(), "figures": []}
        for name, kind in models(small=True).items():
            if name not in (options.model or [name]):
                continue
            bench, counts = Bench(kind), Counted(kind, TEXT, SIDE)
            for steps, count in ((s, n) for s in STEPS for n in COUNTS if s <= options.steps):
                print(f"{name}: {count} references, {steps} steps", file=sys.stderr, flush=True)
                repeats = max(1, options.repeats * STEPS[0] // steps)
                found = bench.figures(counts, count, steps, repeats)
                results["figures"] += [{"model": name, **figure} for figure in found]
                results["load"] = [load, os.getloadavg()[0]]
                keep(options.json, results)
            print(f"{name}: second seed, references in each call: {bench.second_seed()}")
    print(table_of(results))


if __name__ == "__main__":
    main()

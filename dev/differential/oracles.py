"""What a graph is compared with. Every oracle raises what is wrong; none asks the code under test.

An oracle has a rule for the graphs that it can judge (``fits``) and computes the same picture in
two ways. Their difference is judged in ``check``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.model_management
import comfy.samplers
import tiny
import torch
from helpers.editing import Oracle, outermost
from torch import Tensor

from omini2_extension.omini2_core.cache import file as cache_file
from omini2_extension.omini2_core.host import saved as host_saved
from omini2_extension.omini2_core.host.attach import add_saved
from omini2_extension.omini2_core.host.setup import SavedBranch

from . import build, files
from .graph import Graph, Prompt
from .run import Bench

# Samplers that evaluate once a step, at the step's own noise level, and draw no noise.
ONCE = ("euler", "dpmpp_2m", "ipndm", "ipndm_v", "deis", "res_multistep", "gradient_estimation",
        "lms", "ddim")  # fmt: skip
EXACT, NEAR = 0.0, 1e-5


class Wrong(Exception):
    """Something that holds of a graph doesn't."""


@dataclass(frozen=True)
class Compared:
    """Two pictures that should be one.

    Attributes:
        tolerance: of the relative difference; what rounding does to the graph is added to it.
        excuse: whether a warning about the model allows a difference.
        apart: whether they should differ, rather.
    """

    got: Tensor
    want: Tensor
    tolerance: float = NEAR
    excuse: bool = False
    apart: bool = False


ORACLES: dict[str, Callable[[Bench], Compared]] = {}


def oracle(function: Callable[[Bench], Compared]) -> Callable[[Bench], Compared]:
    """Adds one under its name."""
    ORACLES[function.__name__] = function
    return function


@oracle
def reuse(bench: Bench) -> Compared:
    """K/V that are reused where that is exact give the picture of those computed every time."""
    want = bench.run(reuse="off")
    got = bench.run()
    steps = [float(s) for s in build.sigmas_of(bench.graph, bench.base)[:-1]]
    once_a_step = len(want.evaluated) == len(steps) and all(
        abs(a - b) < 1e-4 * max(b, 1e-3) for a, b in zip(want.evaluated, steps, strict=True)
    )
    if bench.graph.joint and not once_a_step:
        return Compared(want.picture, want.picture)  # its K/V are shared within a step
    hooked = any(p.hook for p in bench.graph.prompts)
    return Compared(got.picture, want.picture, excuse=hooked)


@oracle
def refreshed(bench: Bench) -> Compared:
    """The host's whole forward at every step, references' K/V replaced by hand."""
    graph = bench.graph
    every = {"once": 1000, "off": 1}.get(graph.reuse, graph.refresh)
    alone = graph.references == "isolated"
    model = build.model_of(replace(graph, references="off"), bench.base)
    by_hand = Oracle(model, None if alone else lambda step: step % every == 0)
    want = bench.run(model=outermost(by_hand) if graph.conditions else by_hand.model)
    return Compared(bench.run().picture, want.picture)


@oracle
def segments(bench: Bench) -> Compared:
    """A joint condition computed every n steps is one that is computed once in runs of n steps."""
    sigmas = build.sigmas_of(bench.graph, bench.base)
    if float(sigmas[0]) >= 1:
        sigmas[0] = 0.9999  # where noise is left over, a picture can't be told from it
    n = bench.graph.refresh
    got = bench.run(sigmas=sigmas, reuse="every_n_steps").picture
    latent, noise = bench.latent(), bench.noise()
    for start in range(0, len(sigmas) - 1, n):
        part = sigmas[start : start + n + 1]
        latent = bench.run(sigmas=part, reuse="once", latent=latent, noise=noise).picture
        noise = torch.zeros_like(noise)
    return Compared(got, latent, 1e-4)


@oracle
def rows(bench: Bench) -> Compared:
    """However a wrapper regroups a batch's rows, and however memory does."""
    want = bench.run(wrapper="", split=True, reuse="off")
    return Compared(bench.run().picture, want.picture)


@oracle
def pictures(bench: Bench) -> Compared:
    """A batch of pictures is each of them alone, with its own image, prompt and noise."""
    graph = bench.graph
    got = bench.run().picture
    each = [
        bench.run(picture=i, wrapper="", split=False, reuse="off").picture
        for i in range(graph.batch)
    ]
    return Compared(got, torch.cat(each))


@oracle
def by_hand(bench: Bench) -> Compared:
    """Euler steps by hand, every prompt evaluated in a run of its own."""
    graph = bench.graph
    sigmas = build.sigmas_of(graph, bench.base)
    got = bench.run(sigmas=sigmas).picture
    model = build.model_of(replace(graph, reuse="off", wrapper=""), bench.base)
    space = bench.base.model.latent_format

    def predict(prompts: Any, x: Tensor, sigma: Tensor) -> Tensor:
        return predicted(model, build.conditioning(prompts, graph), x, sigma)

    x = sigmas[0] * bench.noise() + (1 - sigmas[0]) * _in(space, bench.latent())
    third = (Prompt(2),)
    for sigma, after in itertools.pairwise(sigmas):
        positive = predict(graph.positive, x, sigma)
        denoised = positive
        if graph.guider == "dual":
            negative, middle = (predict(p, x, sigma) for p in (graph.negative, third))
            denoised = negative + 2.0 * (middle - negative) + graph.cfg * (positive - middle)
        elif graph.guider == "perpneg":
            negative, empty = (predict(p, x, sigma) for p in (graph.negative, third))
            pos, neg = positive - empty, negative - empty
            perp = neg - (neg * pos).sum() / pos.norm() ** 2 * pos
            denoised = empty + graph.cfg * (pos - 0.7 * perp)
        elif graph.guider != "basic":
            negative = predict(graph.negative, x, sigma)
            denoised = negative + graph.cfg * (positive - negative)
        x = x + (x - denoised) / sigma * (after - sigma)
    return Compared(got, space.process_out(x / (1 - sigmas[-1])), 2e-5)


def _in(space: Any, latent: Tensor) -> Tensor:
    return space.process_in(latent) if latent.any() else latent


def predicted(model: Any, prompts: Any, x: Tensor, sigma: Tensor) -> Tensor:
    """The denoised picture as one evaluation with these prompts gives it."""
    found: list[Tensor] = []

    def evaluate(net: Any, _: Tensor, sigmas: Tensor, extra_args: Any, **kwargs: Any) -> Tensor:
        found.append(net(x, sigma.expand(len(x)), **extra_args))
        return x

    guider = build.made(build.custom.BasicGuider, model, prompts)
    zero = torch.zeros_like(x)
    levels = torch.stack((sigma, sigma * 0))
    guider.sample(zero, zero, comfy.samplers.KSAMPLER(evaluate), levels, disable_pbar=True, seed=1)
    return found[0]


@oracle
def dual_model(bench: Bench) -> Compared:
    """Dual Model CFG Guider: every prompt by ordinary runs of its own MODEL."""
    graph = bench.graph
    second = files.model(graph.dev, second=True)
    beside = graph.seed % 4 == 0  # conditions on the negative prompt's MODEL, alone or too
    plain = beside and graph.seed % 8 == 0
    positive = bench.base if plain else build.model_of(graph, bench.base)
    negative = build.with_conditions(second, graph) if beside else second
    prompts = [build.conditioning(p, graph) for p in (graph.positive, graph.negative)]
    sigmas = build.sigmas_of(graph, bench.base)
    guider = build.made(
        build.custom.DualModelGuider, positive, prompts[0], graph.cfg, negative, prompts[1]
    )
    sampler = comfy.samplers.sampler_object("euler")
    got = guider.sample(
        bench.noise(), torch.zeros_like(bench.noise()), sampler, sigmas, disable_pbar=True, seed=1
    )
    x = sigmas[0] * bench.noise()
    for sigma, after in itertools.pairwise(sigmas):
        against = predicted(negative, prompts[1], x, sigma)
        denoised = against + graph.cfg * (predicted(positive, prompts[0], x, sigma) - against)
        x = x + (x - denoised) / sigma * (after - sigma)
    want = bench.base.model.latent_format.process_out(x / (1 - sigmas[-1]))
    return Compared(got, want, 2e-5)


@oracle
def lora(bench: Bench) -> Compared:
    """Ordinary LoRAs don't reach the K/V of OminiControl's independent conditions, or it is said.

    They do those of EasyControl's.
    """
    omini = tuple(replace(each, lora="omini") for each in bench.graph.conditions)
    got, want = (_kv(bench, conditions=omini, **more) for more in ({}, {"loras": ()}))
    return Compared(got, want, excuse=True)


def _kv(bench: Bench, **changes: Any) -> Tensor:
    """The condition's K/V as the model's attention is given them, told by the host's override."""
    graph = replace(bench.graph, **changes)
    kept: list[Tensor] = []
    count = sum(build.encoded(c).token_count for c in graph.conditions)

    def override(function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **kw: Any) -> Tensor:
        if k.shape[-2] > q.shape[-2]:
            kept.extend(t[..., -count:, :].flatten().clone() for t in (k, v))
        return function(q, k, v, heads, **kw)

    model = build.model_of(graph, bench.base)
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    bench.run(model=model, **changes)
    return torch.cat(kept)


@oracle
def merge(bench: Bench) -> Compared:
    """Weights merged by hand, LoRAs loaded beside them."""
    graph = bench.graph
    assert graph.merge is not None
    got = bench.run().picture
    by_hand, loras = _merged_weights(graph)
    model = files.model(graph.dev, given=by_hand)
    for tensors in loras:
        name = tiny.save_lora("soak-merged.safetensors", tensors)
        model = build.made(build.host_nodes.LoraLoaderModelOnly, model, name, 1.0)
    model = build.with_conditions(model, graph)
    want = bench.run(model=model).picture
    return Compared(got, want, 2e-5, excuse=True)


def _merged_weights(graph: Graph) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The merged weights without LoRAs, and the LoRAs with the share that the merge leaves them."""
    merge = graph.merge
    assert merge is not None
    first, second = (files.weights(graph.dev, second=which) for which in (False, True))

    def shares(key: str) -> tuple[float, float]:  # of the first and of the second model
        ratio = 1 - merge.ratio if merge.swapped else merge.ratio
        if merge.node == "add":
            return 1.0, 1.0
        if merge.node == "subtract":
            a, b = ratio, -ratio
        elif merge.node == "blocks":
            ratios = build.block_ratios(ratio)
            found = max((p for p in ratios if key.startswith(p)), key=len, default="img_in.")
            a, b = ratios[found], 1 - ratios[found]
        else:
            a, b = ratio, 1 - ratio
        return (b, a) if merge.swapped else (a, b)

    weights = {k: shares(k)[0] * first[k] + shares(k)[1] * second[k] for k in first}
    loras = []
    for each, which in [*((each, 0) for each in graph.loras), (merge.lora, 1)]:
        if each is None:
            continue
        tensors = {}
        for name, value in files.lora_tensors(each).items():
            key = name.removeprefix("diffusion_model.").rsplit(".", 1)[0]
            key = key.removesuffix(".lora_up").removesuffix(".lora_down")
            # Those that come after ours come after the merge, too.
            share = 1.0 if which == 0 and each.after else shares(key + ".weight")[which]
            scaled = name.endswith((".lora_up.weight", ".diff", ".diff_b"))
            tensors[name] = value * share * each.strength if scaled else value
        loras.append(tensors)
    return weights, loras


@oracle
def integration(bench: Bench) -> Compared:
    """The known region is known to the bit in the end, and nearly so in every preview."""
    graph = bench.graph
    ran = bench.run()
    condition = next(c for c in graph.conditions if c.paint)
    space = bench.base.model.latent_format
    given = build.latent(condition)
    known = ~build.box(graph.rows, graph.columns)
    known = known.repeat_interleave(2, 0).repeat_interleave(2, 1)
    each = given[[i % len(given) for i in range(graph.batch)]]
    for i, preview in enumerate(ran.previews):
        error = float((preview - each)[..., known].abs().max())
        if not error < 1e-4:
            raise Wrong(f"preview {i} shows the known region off by {error:.2g}")
    if graph.schedule in ("first half", "rising"):
        return Compared(each, each)
    out = space.process_out(each)
    return Compared(ran.picture[..., known], out[..., known], EXACT)


@oracle
def off(bench: Bench) -> Compared:
    """Conditions that are shut out, or whose time doesn't come, leave the plain picture."""
    return Compared(bench.run().picture, bench.plain().picture, EXACT)


@oracle
def effect(bench: Bench) -> Compared:
    """A condition changes the picture, whatever there is besides."""
    return Compared(bench.run().picture, bench.plain().picture, 1e-5, apart=True)


@oracle
def again(bench: Bench) -> Compared:
    """A second run gives the same picture, and nothing is left on the model.

    The same bits but for K/V that it computes again, in a batch of another size: of two prompts
    that have the same ones, only one's are kept.
    """
    before = {k: v.clone() for k, v in bench.base.model.diffusion_model.state_dict().items()}
    model = build.model_of(bench.graph, bench.base)
    options = repr(model.model_options), repr(bench.base.model_options)
    first = bench.run(model=model).picture
    second = bench.run(model=model).picture
    if (repr(model.model_options), repr(bench.base.model_options)) != options:
        raise Wrong("the model's options are changed after a run")
    comfy.model_management.unload_all_models()
    for key, value in bench.base.model.diffusion_model.state_dict().items():
        if not torch.equal(value, before[key]):
            raise Wrong(f"the model's {key} is changed after a run")
    return Compared(second, first, EXACT if bench.graph.reuse == "off" else 1e-6)


@oracle
def order(bench: Bench) -> Compared:
    """The same picture whether the host's nodes come before ours or after."""
    graph = bench.graph
    turned = tuple(replace(each, after=not each.after) for each in graph.loras)
    merge = graph.merge
    if merge is not None and not graph.loras:
        merge = replace(merge, after=not merge.after)
    return Compared(bench.run().picture, bench.run(loras=turned, merge=merge).picture, excuse=True)


@oracle
def saved(bench: Bench) -> Compared:
    """A condition's K/V from a file are the condition."""
    graph = bench.graph
    prompt = build.conditioning(graph.positive, graph)
    model = build.model_of(replace(graph, reuse="off", wrapper=""), bench.base)
    want = bench.run(model=model).picture
    given = host_saved.compute(model, prompt, {"samples": bench.latent()}, "")
    plain = build.model_of(replace(graph, conditions=()), bench.base)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "condition.safetensors"
        cache_file.save(given, path)
        read = cache_file.load(path, given.fit)
    (condition,) = graph.conditions
    branch = SavedBranch(read, condition.scale, condition.start, condition.end)
    loaded = build.guided(add_saved(plain, branch), graph)
    return Compared(bench.run(model=loaded).picture, want)


@oracle
def same(bench: Bench) -> Compared:
    """A prompt combined with itself, masked by nothing or cut in time is the prompt."""
    graph = bench.graph
    one = replace(graph.positive[0], range=(0.0, 1.0), area=None, mask=None, strength=1.0)
    cuts = {
        0: (one, one),
        1: (replace(one, range=(0.0, 0.5)), replace(one, range=(0.5, 1.0))),
        2: (replace(one, area=(1.0, 1.0, 0.0, 0.0)),),
        3: (replace(one, area=(1.0, 1.0, 0.0, 0.0), percent=True), one, one),
        4: (replace(one, strength=0.5), replace(one, strength=2.0)),
    }
    number = graph.seed % 5
    # Out of latents with a time the host cuts no areas.
    positive = cuts[0 if files.kind(graph).video and number in (2, 3) else number]
    # Where there is a negative prompt, the host hands areas on to it.
    areas = any(p.area or p.bounds for p in (*positive, *graph.negative))
    guider = "basic" if areas else graph.guider
    want = bench.run(positive=(one,), guider=guider, reuse="off").picture
    return Compared(bench.run(positive=positive, guider=guider).picture, want)


@oracle
def mask(bench: Bench) -> Compared:
    """Every token that a mask touches is kept, however large the mask is beside the image."""
    graph = bench.graph
    draw = torch.Generator().manual_seed(graph.seed)
    factor = graph.steps
    big = torch.zeros(1, 16 * graph.rows * factor, 16 * graph.columns * factor)
    line = int(torch.randint(big.shape[2], (1,), generator=draw))
    big[:, :, line] = 1
    want = torch.zeros(graph.rows, graph.columns)
    want[:, line // (16 * factor)] = 1
    image = torch.rand(1, 16 * graph.rows, 16 * graph.columns, 3, generator=draw)
    if graph.integrated:
        plain = tiny.nodes.ConditionEncode.execute(image, tiny.LatentVae(), "aligned", 0, 0, 1.0)
        got = tiny.compact(plain[0], token_integration=True, mask=big)[0].paint
    elif graph.seed % 2:
        plain = tiny.nodes.ConditionEncode.execute(image, tiny.LatentVae(), "aligned", 0, 0, 1.0)
        got = tiny.compact(plain[0], prune="mask", mask=big)[0].keep
    else:
        made = tiny.nodes.ConditionEncode.execute(
            image, tiny.LatentVae(), "aligned", 0, 0, 1.0, big
        )
        got = made[0].keep
    return Compared(got.float(), want, EXACT)

"""Oracles of graphs with references and Omini2 Spot Edit."""

from __future__ import annotations

from dataclasses import replace

import comfy.latent_formats
import torch
import torch.nn.functional as F
from helpers.editing import MODELS
from helpers.spot_oracle import SpotOracle
from torch import Tensor

from omini2_extension.omini2_core.engine.spot import SpotState

from . import build
from .graph import Graph
from .oracles import EXACT, Compared, Wrong, oracle, rows
from .oracles import ORACLES as ORACLES
from .run import Bench


@oracle
def edit(bench: Bench) -> Compared:
    """The host's whole forward, with the K/V of what is left out replaced in every attention."""
    graph = bench.graph
    settings = graph.edit
    assert settings is not None
    got = bench.run().picture
    base = build.model_of(replace(graph, edit=None), bench.base)
    known = build.edit_references(graph)[0]
    space = comfy.latent_formats.Flux()
    target = space.process_in(known)
    steps = len(build.sigmas_of(graph, bench.base)) - 1
    resets = {"none": [], "3": [3], "auto": [round(s * steps) for s in (0.26, 0.44, 0.62)]}
    full = {*range(settings.full), *resets[settings.resets]}

    def choose(step: int, denoised: Tensor | None) -> Tensor | None:
        if step in full or denoised is None:
            return None
        each = ((denoised - target) ** 4).mean(1, keepdim=True)
        found = F.avg_pool2d(each, 2)[:, 0].amax(0) < settings.threshold
        return found if found.any() else None

    oracle = SpotOracle(base, MODELS["Kontext"], known, choose)
    want = oracle.finished(bench.run(model=oracle.model).picture)
    return Compared(got, want, 2e-5)


@oracle
def edit_rows(bench: Bench) -> Compared:
    """However a wrapper regroups a batch's rows, and however memory does."""
    return rows(bench)


@oracle
def edit_known(bench: Bench) -> Compared:
    """What is left out in the end is the reference to the bit."""
    graph = bench.graph
    states: list[SpotState] = []
    finished = SpotState.finished

    def spy(state: SpotState, latent: Tensor) -> Tensor:
        states.append(state)
        return finished(state, latent)

    SpotState.finished = spy  # type: ignore[method-assign]
    try:
        got = bench.run().picture
    finally:
        SpotState.finished = finished  # type: ignore[method-assign]
    known = build.edit_references(graph)[0].expand_as(got)
    if float(build.sigmas_of(graph, bench.base)[-1]) > 0:
        return Compared(known, known, EXACT)
    left = states[0].last
    if left is None:
        return Compared(known, known, EXACT)
    where = left.repeat_interleave(2, 0).repeat_interleave(2, 1)
    if not torch.isfinite(got).all():
        raise Wrong("there are numbers that are none")
    return Compared(got[..., where], known[..., where], EXACT)


@oracle
def edit_off(bench: Bench) -> Compared:
    """Where nothing agrees with the reference, it is the host's picture, to the bit."""
    want = bench.run(model=build.model_of(_plain(bench.graph), bench.base)).picture
    return Compared(bench.run().picture, want, EXACT)


def _plain(graph: Graph) -> Graph:
    """Without Spot Edit; the prompts' references stay, as the run has them."""
    return replace(graph, edit=None, reuse="off")

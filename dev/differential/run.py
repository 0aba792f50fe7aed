"""Runs graphs, and watches what is said and refused meanwhile."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from unittest import mock

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

import omini2_extension.nodes as nodes

from . import build, files
from .graph import Graph

# A sentence: a node input, what is wrong, and the way out behind a semicolon or comma.
SENTENCE = re.compile(r"(\w+): [^\n]+\.")


@dataclass
class Ran:
    """What one run gave.

    Attributes:
        picture: of the latents' shape, or what else comes out.
        previews: the denoised picture at every step, in the model's space.
        evaluated: the noise levels that the sampler asked for.
    """

    picture: Tensor
    previews: list[Tensor] = field(default_factory=list)
    evaluated: list[float] = field(default_factory=list)


class Late(Exception):
    """A refusal that came when time had been spent already."""


@contextmanager
def said() -> Iterator[list[str]]:
    """Collects the extension's warnings."""
    lines: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Omini2: "):
                lines.append(record.getMessage().removeprefix("Omini2: "))

    handler, root = Listen(logging.WARNING), logging.getLogger()
    root.addHandler(handler)
    try:
        yield lines
    finally:
        root.removeHandler(handler)


@cache
def inputs() -> frozenset[str]:
    """The names of all our nodes' inputs, and of the host's that have one on a model."""
    all_nodes = [*vars(nodes).values(), getattr(custom, "DualModelGuider", None)]
    schemas = [n.define_schema() for n in all_nodes if hasattr(n, "define_schema")]
    return frozenset(i.id for schema in schemas for i in schema.inputs)


def is_sentence(message: str) -> bool:
    """Whether a refusal begins with a node's input and is one line that ends."""
    found = SENTENCE.fullmatch(message)
    return found is not None and found[1] in inputs()


class Bench:
    """One graph's model, on which it is run in all its variants.

    Attributes:
        graph: the graph.
        nudge: how much the noise is changed, to see what rounding errors become.
    """

    def __init__(self, graph: Graph, nudge: float = 0.0) -> None:
        self.graph = graph
        self.nudge = nudge
        self.base = files.base(graph)

    @property
    def shape(self) -> torch.Size:
        """Of the pictures' latents."""
        graph = self.graph
        return files.kind(graph).latent(graph.rows, graph.columns, 0, graph.batch).shape

    def noise(self) -> Tensor:
        """Of the latents' shape."""
        draw = torch.Generator().manual_seed(self.graph.seed)
        noise = torch.randn(self.shape, generator=draw)
        return noise * (1 + self.nudge * torch.randn(noise.shape, generator=draw))

    def latent(self) -> Tensor:
        """What sampling starts from, of the noise's shape."""
        graph, shape = self.graph, self.shape
        if graph.start == "empty":
            return torch.zeros(shape)
        draw = torch.Generator().manual_seed(50 + graph.seed)
        one = torch.randn(1, *shape[1:], generator=draw)
        if graph.start == "repeated":  # as RepeatLatentBatch does
            return build.made(build.host_nodes.RepeatLatentBatch, {"samples": one}, graph.batch)[
                "samples"
            ]
        return torch.randn(shape, generator=draw)

    def run(
        self, *, model: Any = None, picture: int | None = None, sigmas: Tensor | None = None,
        latent: Tensor | None = None, noise: Tensor | None = None, **changes: Any,
    ) -> Ran:  # fmt: skip
        """Runs the graph, with some of its fields changed.

        Args:
            picture: only this one of the batch.
        """
        graph = replace(self.graph, **changes)
        model = build.model_of(graph, self.base, picture) if model is None else model
        sigmas = build.sigmas_of(graph, self.base) if sigmas is None else sigmas
        noise = self.noise() if noise is None else noise
        latent = self.latent() if latent is None else latent
        if picture is not None:
            noise, latent = noise[picture][None], latent[picture][None]
        ran = Ran(noise)

        def spy(executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            ran.evaluated.append(float(timestep.flatten()[0]))
            return executor(x, timestep, *args, **kwargs)

        model = model.clone()
        options = model.model_options["transformer_options"]
        add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "soak", spy, options)
        mask = None
        if graph.noise_mask:
            draw = torch.Generator().manual_seed(8)
            mask = torch.rand(1, 1, *self.shape[-2:], generator=draw)
        guider = build.guider_of(graph, model, picture)
        torch.manual_seed(graph.seed)  # which some samplers' noise comes from
        try:
            with short_of_memory() if graph.split else nullcontext():
                ran.picture = guider.sample(
                    noise, latent, build.sampler_of(graph), sigmas, denoise_mask=mask,
                    callback=lambda step, x0, x, total: ran.previews.append(x0.clone()),
                    disable_pbar=True, seed=graph.seed,
                )  # fmt: skip
        except Exception as error:
            always = all(p.range == (0.0, 1.0) for p in graph.prompts)  # none comes later
            if is_refusal(error) and ran.previews and always:
                raise Late(f"after {len(ran.previews)} steps: {error}") from error
            raise
        return ran

    def plain(self, **changes: Any) -> Ran:
        """Runs the graph without our nodes."""
        return self.run(**{"conditions": (), "reuse": "off", "references": "off", **changes})


def is_refusal(error: Exception) -> bool:
    """Whether it is one of ours."""
    return type(error).__name__ == "Omini2Error"


def short_of_memory() -> Any:
    """The host evaluates prompts one by one."""
    return mock.patch.object(comfy.model_management, "get_free_memory", build.free_memory)


def difference(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||."""
    if got.shape != want.shape:
        return float("inf")
    return float((got - want).norm() / want.norm().clamp_min(1e-30))

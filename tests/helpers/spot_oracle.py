"""Spot Edit by hand: the host's whole forward, with K/V replaced in every attention."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from helpers.editing import Tiny
from torch import Tensor

# (step, what was denoised last, None before the first) -> (h, w) bool, what is left out; None: the
# step is a full one.
Choose = Callable[[int, Tensor | None], Tensor | None]


class SpotOracle:
    """Nothing of the extension is in it, and no row is ever left out of the model.

    Attributes:
        model: to be sampled.
        unedited: what was left out, at each of the sampler's calls.
    """

    def __init__(self, model: ModelPatcher, tiny: Tiny, known: Tensor, choose: Choose) -> None:
        """Args:
        known: the reference's latent, as the VAE gives it.
        """
        self.model = model.clone()
        self.tiny = tiny
        self.given = known
        self.known = model.model.process_latent_in(known)
        self.choose = choose
        self.kept: dict[Any, tuple[Tensor, Tensor]] = {}
        self.denoised: Tensor | None = None
        self.unedited: list[Tensor | None] = []
        self.step: int | None = None
        self.rows = (0, 0)
        add = self.model.add_wrapper_with_key
        add(WrappersMP.PREDICT_NOISE, "oracle", self.predict)
        add(WrappersMP.DIFFUSION_MODEL, "oracle", self.forward)
        options = self.model.model_options["transformer_options"]
        options["optimized_attention_override"] = self.attention

    def predict(
        self, executor: Any, x: Tensor, timestep: Tensor, options: Any, seed: Any
    ) -> Tensor:
        schedule = options["transformer_options"]["sample_sigmas"]
        step = int((schedule[:-1] > timestep[0] * 1.00001).sum())
        if step != self.step:
            self.step = step
            self.now = self.choose(step, self.denoised)
        self.unedited.append(self.now)
        out = executor(x, timestep, options, seed)
        if self.now is not None:
            frozen = self.known if self.denoised is None else self.denoised
            out = torch.where(self.pixels(self.now, out), frozen.to(out), out)
        self.denoised = out.clone()
        return out

    def pixels(self, tokens: Tensor, like: Tensor) -> Tensor:
        side = self.tiny.side
        whole = F.interpolate(tokens[None, None].float(), scale_factor=side, mode="nearest")[0, 0]
        return whole[: like.shape[-2], : like.shape[-1]] > 0

    def finished(self, latent: Tensor) -> Tensor:
        """What the sampler gave, with the reference where the last choice left it."""
        last = next((u for u in reversed(self.unedited) if u is not None and u.any()), None)
        if last is None:
            return latent
        return torch.where(self.pixels(last, latent), self.given, latent)

    def forward(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        given = bound.arguments

        def tokens(t: Tensor) -> int:
            return -(-t.shape[-2] // self.tiny.side) * -(-t.shape[-1] // self.tiny.side)

        refs = given.get("ref_latents") or ()
        self.rows = tokens(given["x"]), sum(map(tokens, refs))
        self.names = given["transformer_options"]["uuids"]
        self.reads = iter(range(10_000))
        return executor(*args, **kwargs)

    def attention(self, function: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kw: Any):
        if "block_index" not in kw.get("transformer_options", {}):
            return function(q, k, v, *rest, **kw)
        number, (n, r) = next(self.reads), self.rows
        text = k.shape[2] - n - r
        fixed = torch.zeros(n + r, dtype=torch.bool)
        if self.now is not None:
            fixed[:n] = self.now.flatten()
            fixed[n:] = True
        k, v = k.clone(), v.clone()
        batch = len(k) // len(self.names)
        for i, name in enumerate(self.names):
            rows = slice(i * batch, (i + 1) * batch)
            images = k[rows, :, text:], v[rows, :, text:]
            for own, old in zip(images, self.kept.get((name, number), images), strict=True):
                own[:, :, fixed] = old[:, :, fixed]
            self.kept[name, number] = images[0].clone(), images[1].clone()
        return function(q, k, v, *rest, **kw)


class MaskOracle(SpotOracle):
    """With a mask from the first step on: tokens outside of it are seen by none.

    ``choose`` tells the steps at which references are computed, by None.
    """

    def __init__(
        self, model: ModelPatcher, tiny: Tiny, known: Tensor, edited: Tensor, full: set[int]
    ) -> None:
        super().__init__(model, tiny, known, lambda step, denoised: ~edited)
        self.full = full

    def predict(
        self, executor: Any, x: Tensor, timestep: Tensor, options: Any, seed: Any
    ) -> Tensor:
        self.denoised = None  # what is known stays so
        return super().predict(executor, x, timestep, options, seed)

    def attention(self, function: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kw: Any):
        if "block_index" not in kw.get("transformer_options", {}):
            return function(q, k, v, *rest, **kw)
        number, (n, r) = next(self.reads), self.rows
        text = k.shape[2] - n - r
        k, v = k.clone(), v.clone()
        batch = len(k) // len(self.names)
        for i, name in enumerate(self.names):
            rows = slice(i * batch, (i + 1) * batch)
            images = k[rows, :, text + n :], v[rows, :, text + n :]
            if self.step in self.full:
                self.kept[name, number] = images[0].clone(), images[1].clone()
            for own, old in zip(images, self.kept[name, number], strict=True):
                own[:] = old
        seen = torch.ones(text + n + r, dtype=torch.bool)
        seen[text : text + n] = ~self.now.flatten()
        return function(q, k[:, :, seen], v[:, :, seen], *rest, **kw)

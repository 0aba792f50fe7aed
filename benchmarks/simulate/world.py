"""One process with a pretended card: the host, its models without numbers, and runs of them."""

import gc
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch

from benchmarks.simulate import dynamic as dynamic_vram
from benchmarks.simulate.card import Card, Tally
from benchmarks.simulate.cuda import pretend
from benchmarks.simulate.device import Gpu
from dev.load import load_extension, load_host

RANK, SIDE, TEXT = 4, 64, 512  # of the LoRAs; tokens of the picture's side, and of text
GUIDANCE = 3.5


class Loaded(Exception):
    """The model is loaded, which is all that was to be known."""


@dataclass
class Result:
    """What a run did.

    Attributes:
        asked: bytes that the host was asked to leave free, beside the weights.
        loaded, size: bytes of the weights that are on the card, and of all.
        kept: bytes of K/V; storage and place as they were in the end.
        evaluations: a tally of each call of the model.
        left: bytes on the card when all was over, beside the weights.
        said: warnings.
    """

    asked: int = 0
    loaded: int = 0
    size: int = 0
    kept: int = 0
    storage: str = "-"
    place: str = "-"
    evaluations: list[Tally] = field(default_factory=list)
    left: int = 0
    said: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def above(self) -> int:
        """Bytes beside the weights, at most."""
        tallies = self.evaluations
        return max((each.peak for each in tallies), default=0) - tallies[0].base if tallies else 0


class World:
    """The host on a card. One a process: it can't be taken back."""

    def __init__(self, card: Card, dynamic: bool = False) -> None:
        """Args:
        dynamic: whether the host has dynamic VRAM, which newer ones have.
        """
        self.gpu = Gpu(card)
        pretend(self.gpu)
        load_host()
        from comfy.cli_args import args

        args.use_pytorch_cross_attention = True
        load_extension()
        self._dynamic = dynamic
        if dynamic:
            dynamic_vram.pretend(self.gpu)
        torch.set_num_threads(1)
        logging.getLogger().setLevel(logging.ERROR)
        self._models: dict[Any, Any] = {}

    @contextmanager
    def working(self) -> Iterator[Gpu]:
        """As the host executes nodes, on the device."""
        with self.gpu, torch.inference_mode():
            yield self.gpu

    def model(self, kind: Any, fp8: bool = False) -> Any:
        """One of `benchmarks.editing`'s models as the host's loader makes it, on the CPU."""
        key = kind.kind, repr(kind.config), fp8
        if key not in self._models:
            self._models[key] = self._built(kind, fp8)
        return self._models[key]

    def _built(self, kind: Any, fp8: bool) -> Any:
        import comfy.model_base
        import comfy.model_management
        import comfy.model_patcher
        import comfy.supported_models

        config = getattr(comfy.supported_models, kind.kind)(dict(kind.config))
        cast = (torch.float8_e4m3fn, torch.bfloat16) if fp8 else (torch.bfloat16, None)
        config.set_inference_dtype(*cast)
        with self.gpu.without_numbers(), dynamic_vram.off() if self._dynamic else nullcontext():
            base = config.get_model({}, "", device=torch.device("cpu"))
            base.requires_grad_(False)
        # Noise levels are looked at.
        base.model_sampling = comfy.model_base.model_sampling(config, base.model_type)
        device = comfy.model_management.get_torch_device()
        patcher = getattr(comfy.model_patcher, f"ModelPatcher{'Dynamic' * self._dynamic}")
        return patcher(base, load_device=device, offload_device=torch.device("cpu"))

    def forget(self) -> None:
        """Everything is off the card, and what runs have left is gone."""
        import comfy.model_management

        from benchmarks import flux

        for each in self._models.values():
            flux.forget(each)
        with self.working():
            comfy.model_management.unload_all_models()
        gc.collect()

    def run(
        self, model: Any, sample: Callable[[], Any], only_load: bool = False,
        before: Callable[[int], None] = lambda n: None,
    ) -> Result:  # fmt: skip
        """Watches something that samples a MODEL.

        Args:
            before: is told the number of each call of the model before it.
        """
        result, gpu = Result(), self.gpu
        gpu.faults.clear()
        try:
            with ExitStack() as stack:
                for each in self._watched(result, only_load, before):
                    stack.enter_context(each)
                stack.enter_context(self.working())
                sample()
        except Loaded:
            pass
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            result.error = f"{type(error).__name__}: {error}"
        gc.collect()
        result.loaded, result.size = model.loaded_size(), model.model_size()
        result.left = gpu.live - result.loaded
        result.faults = list(gpu.faults)
        return result

    def _watched(
        self, result: Result, only_load: bool, before: Callable[[int], None]
    ) -> Iterator[Any]:
        import comfy.model_base
        import comfy.model_management as management

        from omini2_extension.omini2_core import errors
        from omini2_extension.omini2_core.cache.run_cache import RunCache

        load, base = management.load_models_gpu, comfy.model_base.BaseModel
        apply_model, close, gpu = base.apply_model, RunCache.close, self.gpu

        def loading(*args: Any, **kwargs: Any) -> Any:
            result.asked = kwargs["minimum_memory_required"]
            return load(*args, **kwargs)

        def applying(*args: Any, **kwargs: Any) -> Any:
            if only_load:
                raise Loaded
            before(len(result.evaluations))
            result.evaluations.append(gpu.begin())
            out = apply_model(*args, **kwargs)
            gpu.begin()  # what the sampler does between is its own
            return out

        def closing(cache: Any) -> None:
            result.kept = cache.nbytes
            result.storage, result.place = cache.storage.format, cache.storage.keep_on
            close(cache)

        def saying(sentence: str, remedies: Any) -> None:
            result.said.append(sentence)

        yield mock.patch.object(management, "load_models_gpu", loading)
        yield mock.patch.object(base, "apply_model", applying)
        yield mock.patch.object(RunCache, "close", closing)
        yield mock.patch.object(errors, "_listeners", [saying])

    def sample(
        self, kind: Any, model: Any, references: int, steps: int, cfg: float, batch: int
    ) -> None:
        """As the stock KSampler does."""
        import comfy.sample

        latent = torch.zeros_like(kind.latent(SIDE)).repeat_interleave(batch, 0)
        noise = comfy.sample.prepare_noise(latent, 0)
        prompts = (self.prompt(kind, pooled, references) for pooled in (1.0, 0.5))
        comfy.sample.sample(
            model, noise, steps, cfg, "euler", "simple", *prompts, latent,
            disable_pbar=True, seed=0,
        )  # fmt: skip

    def prompt(self, kind: Any, pooled: float, references: int = 0) -> list[Any]:
        """In the host's form."""
        width = kind.config.get("vec_in_dim") or 1
        said = {"pooled_output": torch.full((1, width), pooled), "guidance": GUIDANCE}
        if references:
            said["reference_latents"] = [kind.latent(SIDE) for _ in range(references)]
        return [[torch.randn(1, max(TEXT, kind.padded), kind.text), said]]


def flux1(depth: int | None = None) -> tuple[Any, Any]:
    """FLUX.1-dev with so many double blocks and twice as many single ones: its kind and shape."""
    from benchmarks import costs, flux
    from benchmarks.editing import Kind

    full = costs.FLUX1_DEV
    depth = depth or full.depth
    shape = replace(full, depth=depth, depth_single=2 * depth)
    return Kind("Flux", flux.config(shape), full.text_width), shape

"""K/V to and from files: computing them through the host, what they fit, where the files lie."""

import inspect
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..cache.entry import Entry
from ..cache.file import EMPTY, IMAGE, Saved
from ..cache.policy import CachePolicy
from ..engine.evaluation import NO_MAP, Evaluation, rows_of
from ..errors import Omini2Error, require_kind
from .attach import get_setup, with_setup
from .hooks import Hooks
from .identity import fit_of, untellable, with_ordinary
from .model import require_flux1
from .out_of_memory import CONDITIONS, Ways
from .patches import replaced_calls
from .rows import TAG
from .sampling import outer_sample
from .setup import Branch, Setup

# What K/V depend on of a prompt, in the host's words.
OF_A_PROMPT = "pooled_output", "guidance"


def compute(model: ModelPatcher, positive: Any, latent: dict[str, Any], description: str) -> Saved:
    """The K/V of a model's one condition, computed as a run with this prompt would.

    Args:
        latent: the host's LATENT, for the size of the picture.

    Raises:
        Omini2Error: no condition or several, or one whose K/V belong to a single picture.
    """
    require_flux1(model)
    samples = latent.get("samples") if isinstance(latent, dict) else None
    right = isinstance(samples, Tensor) and samples.ndim == 4
    require_kind("latent_image", latent, right, "latent image", "Empty Latent Image")
    prompt = isinstance(positive, list) and positive and all(map(_is_prompt, positive))
    require_kind("positive", positive, bool(prompt), "conditioning", "CLIP Text Encode")
    if len(positive) > 1:
        raise Omini2Error(
            f"positive: it holds {len(positive)} prompts, and K/V belong to one; connect a single "
            "CLIP Text Encode."
        )
    # Where and when the prompt counts is none of the condition's business.
    text, settings = positive[0]
    positive = [[text, {key: settings[key] for key in OF_A_PROMPT if key in settings}]]
    setup = get_setup(model)
    branch = _one_branch(setup)
    fit = fit_of(model)
    if branch.lora.family.keeps_ordinary:
        fit = replace(fit, model=with_ordinary(model, fit))
    storage = "model" if setup.policy is None else setup.policy.storage
    policy = CachePolicy("once", storage=storage, keep_on="gpu")
    # K/V are the same whenever and however much they count later.
    branch = replace(branch, condition_scale=1.0, start_percent=0.0, end_percent=1.0)
    once = replace(setup, branches=(branch,), policy=policy)
    captured = Captured()
    wrapper = partial(outer_sample, make_hooks=partial(Capture, captured))
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])[:1]
    comfy.sample.sample(
        with_setup(model, once, wrapper), torch.zeros_like(samples), 1, 1.0, "euler", "simple",
        positive, positive, samples, disable_pbar=True,
    )  # fmt: skip
    call, entries = captured.call, captured.entries
    assert call is not None
    follows = branch.lora.family.branch_guidance is None and call.guidance is not None
    return Saved(
        fit=fit,
        tokens=branch.condition.token_count,
        picture_hw=call.picture_hw if branch.condition.placement.kind == "fit" else None,
        description=description,
        lora=branch.lora.name,
        pooled=rows_of(call.pooled, range(1)),
        guidance=float(call.guidance[0]) if follows and call.guidance is not None else None,
        entries=entries,
    )


@dataclass
class Captured:
    """What a run was for.

    Attributes:
        call: its evaluation.
        entries: the K/V, of the image and, with image guidance, of a black one.
    """

    call: Evaluation | None = None
    entries: dict[str, Entry] = field(default_factory=dict)


class Capture(Hooks):
    """A run that only computes the first condition's K/V; the picture stays as it is."""

    def __init__(self, captured: Captured, *args: Any) -> None:
        super().__init__(*args)
        self._captured = captured

    @property
    def shown(self) -> Setup:
        """No node is told: there is no picture."""
        return Setup()

    @property
    def ways_out(self) -> Ways:
        """There is no picture to be made smaller, and K/V stay where they are computed."""
        return CONDITIONS

    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """In place of the model's forward."""
        tag = kwargs.pop(TAG, None)
        arguments = inspect.signature(executor.original).bind(*args, **kwargs).arguments
        call = self.evaluation(executor.class_obj, arguments, tag)
        if call.axis_map != NO_MAP:
            raise Omini2Error(
                "model: its RoPE options move positions, which saved K/V can't follow; take the "
                "node that sets them out of the graph."
            )
        if replaced_calls(self._model):
            raise untellable()
        self._captured.call = call
        guided = self._setup.image_guidance_scale != 1.0
        for each in [call, replace(call, empty=True)] if guided else [call]:
            with self.run.evaluation(each):
                self._captured.entries[EMPTY if each.empty else IMAGE] = self.run.entries[0]
        return torch.zeros_like(arguments["x"])


def _is_prompt(entry: Any) -> bool:
    return len(entry) == 2 and isinstance(entry[0], Tensor) if isinstance(entry, list) else False


def _one_branch(setup: Setup) -> Branch:
    if len(setup.branches) != 1 or setup.saved:
        count = len(setup.branches) + len(setup.saved)
        raise Omini2Error(
            f"model: it has {count} conditions and a file holds one; connect a model with just one "
            "Apply Omini2 LoRA node."
        )
    branch = setup.branches[0]
    if branch.joint:
        raise Omini2Error(
            "model: a joint condition looks at the picture, so its K/V fit no other; use a LoRA "
            "trained for independent conditions, or set attention to independent."
        )
    if len(branch.condition.latent) > 1 or branch.condition.paint is not None:
        raise Omini2Error(
            "model: the condition holds several images or is a token integration; encode a single "
            "image for a file."
        )
    return branch

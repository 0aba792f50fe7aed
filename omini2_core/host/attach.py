"""Puts what the nodes say onto a clone of the MODEL."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.model_sampling
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..errors import Omini2Error
from ..flux1.numbers import schedule_shift
from .identity import between_runs
from .patches import put_on_picture
from .sampling import outer_sample, refuse_to_prepare
from .setup import KEY, Branch, SavedBranch, Setup


def get_setup(model: ModelPatcher) -> Setup:
    """What the extension's nodes have said about this model so far."""
    return model.model_options["transformer_options"].get(KEY) or Setup()


def with_setup(
    model: ModelPatcher, setup: Setup, wrapper: Callable[..., Any] = outer_sample
) -> ModelPatcher:
    """A clone of the model with this setup; the model given stays as it was.

    Args:
        wrapper: what is around its sampling.
    """
    clone = model.clone()
    clone.model_options["transformer_options"][KEY] = setup
    # Adding appends: without removing, a second node would run the wrapper twice.
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, wrapper)
    options = clone.model_options["transformer_options"]
    refused = options.setdefault("wrappers", {}).setdefault(WrappersMP.PREPARE_SAMPLING, {})
    refused[KEY] = [refuse_to_prepare]
    clone.remove_callbacks_with_key(CallbacksMP.ON_DETACH, KEY)
    clone.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, _unloaded)
    return clone


def _unloaded(model: ModelPatcher, unpatch_all: bool) -> None:
    """What runs have left goes off the device with the model, not when a clone takes over."""
    if unpatch_all:
        between_runs(model).clear()


def add_branch(model: ModelPatcher, branch: Branch) -> ModelPatcher:
    """A clone of the model with one more condition.

    Raises:
        Omini2Error: a second token integration.
    """
    setup = get_setup(model)
    paint = branch.condition.paint
    if paint is not None and setup.integration is not None:
        raise Omini2Error(
            "condition: this model has a token integration already, and a picture can have only "
            "one; join the masks in one Compact Tokens node."
        )
    clone = with_setup(model, replace(setup, branches=(*setup.branches, branch)))
    if branch.lora.family.on_picture and branch.strength:
        put_on_picture(clone, branch.lora.deltas, branch.strength)
    if branch.condition.shift_schedule and paint is not None and not paint.all():
        _shift_schedule(clone, int(paint.sum()))
    return clone


def _shift_schedule(model: ModelPatcher, tokens: int) -> None:
    """Shifts FLUX.1-dev's noise schedule for this many picture tokens, as the original does.

    FLUX.1-schnell's schedule has no shift, here as in the original.
    """
    current = model.get_model_object("model_sampling")
    if not isinstance(current, comfy.model_sampling.ModelSamplingFlux):
        return
    shifted = type(current)(model.model.model_config)
    shifted.set_parameters(shift=schedule_shift(tokens))
    model.add_object_patch("model_sampling", shifted)


def add_saved(model: ModelPatcher, branch: SavedBranch) -> ModelPatcher:
    """A clone of the model with one more condition, from a file."""
    setup = get_setup(model)
    return with_setup(model, replace(setup, saved=(*setup.saved, branch)))

"""K/V are gone after a run, however it ends, and the next run knows nothing of it."""

import gc
import weakref

import comfy.model_management
import pytest
import torch
from tiny import apply, random_condition, random_lora, sample, with_cache

from omini2_extension.omini2_core.cache.run_cache import RunCache
from omini2_extension.omini2_core.engine.branch import BranchSource


@pytest.fixture(params=["joint", "independent"])
def conditioned(model, request):
    lora = random_lora("cleanup.safetensors")
    model = apply(model, random_condition(), lora, attention=request.param)
    return with_cache(model, "every_n_steps", 2)


@pytest.fixture
def kept(monkeypatch) -> list:
    """Weak references to all K/V that a run keeps."""
    references = []
    keep = RunCache.store

    def spy(cache, entry, number, k, v):
        keep(cache, entry, number, k, v)
        known = [reference() for reference in references]
        for tensor in entry.blocks[number].tensors:
            if not any(tensor is each for each in known):
                references.append(weakref.ref(tensor))

    monkeypatch.setattr(RunCache, "store", spy)
    return references


def alive(references) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


def test_after_a_run(conditioned, kept) -> None:
    during = []

    def callback(*_):
        during.append(alive(kept))

    sample(conditioned, callback=callback)
    assert during == [10, 10, 10, 10]
    assert len(kept) == 10  # a refresh fills what is there
    assert alive(kept) == 0


class Stop(Exception):
    pass


def replacing(model, failure, at: int):
    """The model with a block that fails at the n-th evaluation."""
    calls = []

    def replacement(args, extra):
        calls.append(1)
        if len(calls) == at:
            raise failure
        return extra["original_block"](args)

    patched = model.clone()
    patched.set_model_patch_replace(replacement, "dit", "single_block", 1)
    return patched


@pytest.mark.parametrize(
    "failure",
    [
        Stop("in a block"),
        comfy.model_management.InterruptProcessingException(),
    ],
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_after_a_failure_inside_a_block(conditioned, kept, failure, at) -> None:
    want = sample(conditioned)
    options = repr(conditioned.model_options)
    with pytest.raises(type(failure)):
        sample(replacing(conditioned, failure, at))
    failure.__traceback__ = None
    assert kept
    assert alive(kept) == 0
    assert repr(conditioned.model_options) == options
    assert torch.equal(sample(conditioned), want)


def test_after_an_interrupt_between_steps(conditioned, kept) -> None:
    want = sample(conditioned)

    def interrupt(step, *_):
        if step == 1:
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(conditioned, callback=interrupt)
    assert alive(kept) == 0
    assert torch.equal(sample(conditioned), want)


def test_failure_while_a_run_is_prepared(conditioned, kept, monkeypatch) -> None:
    want = sample(conditioned)
    with monkeypatch.context() as patch:

        def fail(*_):
            raise Stop

        patch.setattr(BranchSource, "begin", fail)
        with pytest.raises(Stop):
            sample(conditioned)
    assert alive(kept) == 0
    assert torch.equal(sample(conditioned), want)


def test_the_models_own_blocks_are_untouched(conditioned) -> None:
    flux = conditioned.model.diffusion_model
    before = {name: id(module) for name, module in flux.named_modules()}
    forward = type(flux).forward, type(flux).forward_orig
    sample(conditioned)
    assert {name: id(module) for name, module in flux.named_modules()} == before
    assert (type(flux).forward, type(flux).forward_orig) == forward
    assert "forward" not in vars(flux)

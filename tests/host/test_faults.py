"""Whatever goes wrong in a run, it leaves nothing behind, and the next one gives the same picture.

Faults are put in where a user's machine has them: an exception, Cancel, or memory that runs out at
any allocation, in any part of a run.
"""

import gc
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_management import InterruptProcessingException, interrupt_current_processing
from comfy.samplers import CFGGuider
from helpers import editing
from helpers.editing import MODELS
from helpers.patterns import box, integrated
from tiny import (
    apply,
    flux_config,
    make_model,
    pytorch_attention,
    random_condition,
    random_lora,
    reference,
    relative_error,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omini2_extension.omini2_core.cache import between_runs
from omini2_extension.omini2_core.engine.branch import BranchWalk
from omini2_extension.omini2_core.engine.references import References
from omini2_extension.omini2_core.engine.run import Run
from omini2_extension.omini2_core.flux1.blocks import DoubleBlock, SingleBlock
from omini2_extension.omini2_core.host import identity, sampling
from omini2_extension.omini2_core.host.reference_hooks import ReferenceHooks

STEPS = 3  # with a refresh at the first and at the last
OUT_OF_MEMORY_AT = 12  # of the allocations of a run, evenly spread


def sample(model: Any, **options: Any) -> torch.Tensor:
    """A run with a reference."""
    kind = MODELS["FLUX.2 klein" if model.model.diffusion_model.patch_size == 1 else "Kontext"]
    prompt = kind.prompt(0, kind.latent(3, 4, 1))
    return editing.sample(model, kind, prompt, h=6, w=6, **options)


@pytest.fixture(scope="module")
def conditioned():
    """Two conditions on a model with an ordinary LoRA, beside joint references."""
    style = reference("dev_like").under("lora.style.")
    model = make_model(flux_config(True))
    return with_conditions(comfy.sd.load_lora_for_models(model, None, style, 0.7, 0)[0])


def with_conditions(model):
    """The model with a joint and an independent condition, refreshed and computed once."""
    lora = random_lora("faults.safetensors")
    for seed, attention in enumerate(("joint", "independent")):
        condition = random_condition(3, 4, seed, placement="fit")
        model = apply(model, condition, lora, attention=attention)
    return editing.cached(model, "auto", 2)


@pytest.fixture(scope="module")
def isolated():
    """A model whose references are computed once."""
    return editing.cached(MODELS["FLUX.2 klein"].make(), references="isolated")


@pytest.fixture(autouse=True)
def nobody_pressed_cancel() -> Iterator[None]:
    """What the host does before each prompt."""
    yield
    interrupt_current_processing(False)


@pytest.fixture
def frozen() -> Iterator[None]:
    """The garbage collector looks only at what a test makes, which takes no time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def state(model) -> dict[str, Any]:
    """All of a model that a run could leave changed."""
    flux = model.model.diffusion_model
    return {
        "options": repr(model.model_options),
        "patches": (model.patches_uuid, sorted(model.patches), sorted(model.object_patches)),
        "extensions": repr((model.wrappers, model.callbacks, model.injections)),
        "modules": [(name, id(each), id(type(each))) for name, each in flux.named_modules()],
        "hooks": [
            (len(each._forward_hooks), len(each._forward_pre_hooks), "forward" in vars(each))
            for each in flux.modules()
        ],
    }


def weights(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.model.diffusion_model.state_dict().items()}


@dataclass
class Before:
    """The model and its picture before a fault."""

    model: Any
    picture: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        kept = identity.between_runs(self.model)
        kept.clear()  # another test's may come from another attention
        self.picture = sample(self.model, steps=STEPS)
        self.state, self.weights = state(self.model), weights(self.model)
        kept.clear()  # or there would be nothing to compute beforehand

    def is_still_so(self) -> None:
        """Everything is as it was, and so is the next picture."""
        interrupt_current_processing(False)
        assert state(self.model) == self.state
        now = weights(self.model)
        assert all(torch.equal(now[name], value) for name, value in self.weights.items())
        assert torch.equal(sample(self.model, steps=STEPS), self.picture)


@pytest.fixture
def before(conditioned) -> Before:
    return Before(conditioned)


# --- exceptions and Cancel, wherever a run is --------------------------------------------------


class Stop(Exception):
    pass


def cancel() -> None:
    """The button; the model's next layer hears it."""
    interrupt_current_processing()


def fail() -> None:
    raise Stop


# Where it happens: what is called there, and the how manieth call of a run.
PLACES = {
    "in prefill": (BranchWalk, "keys_values", 2),
    "at prefill's end": (SingleBlock, "keys_values", 1),
    "in the first computation": (DoubleBlock, "halves", 2),
    "in a refresh": (SingleBlock, "halves", 4),  # the last block stops earlier
    "in the middle of a block": (Run, "attend", 7),
    "behind a block": (Run, "_after", 3),
    "while references are kept": (References, "store", 2),
    "while references' K/V are put in": (References, "arrived", 2),
}
CLEAN_UP = {
    "after an evaluation": (Run, "_shut", 2),
    "at a run's end": (Run, "close", 1),
    "at the end of references": (ReferenceHooks, "close", 1),
    "while K/V are kept for the next run": (between_runs.BetweenRuns, "put", 1),
    "in the report": (sampling, "report", 1),
}


@contextmanager
def fault(place: tuple[Any, str, int], act: Callable[[], None]) -> Iterator[list[int]]:
    """Does something at the n-th call of a function, before it does its own work."""
    owner, name, at = place
    original, calls = getattr(owner, name), []

    def replaced(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            act()
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, replaced)
        yield calls


def cases(verdict: str) -> list[Any]:
    return [
        pytest.param(
            place,
            act,
            wanted,
            id=f"{name} {where}",
            marks=pytest.mark.compatibility("Faults", f"{name} {where}", verdict),
        )
        for where, place in {**PLACES, **CLEAN_UP}.items()
        for name, act, wanted in (
            ("an exception", fail, Stop),
            ("Cancel", cancel, InterruptProcessingException),
        )
    ]


@pytest.mark.parametrize(("place", "act", "wanted"), cases("works"))
def test_a_run_that_ends_early(before: Before, place, act, wanted) -> None:
    # Cancel at a run's very end comes too late for it.
    late = act is cancel and place in CLEAN_UP.values() and place[1] != "_shut"
    ended = None
    with fault(place, act) as calls:
        try:
            got = sample(before.model, steps=STEPS)
        except (Stop, InterruptProcessingException) as error:
            ended = type(error)
    assert len(calls) >= place[2]
    if late:
        assert ended is None and torch.equal(got, before.picture)
    else:
        assert ended is wanted
    before.is_still_so()


# --- out of memory -----------------------------------------------------------------------------


class Memory(TorchDispatchMode):
    """Counts allocations, runs out of memory at one of them, and knows which are still held."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at, self.count = at, 0
        self.made: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata in given or not storage.nbytes():
                continue
            self.count += 1
            if self.count == self.at:
                raise torch.OutOfMemoryError(f"no memory for {func}")
            self.made.append(StorageWeakRef(storage))
        return out

    def held(self) -> set[int]:
        """The storages that something still holds."""
        gc.collect()
        return {ref.cdata for ref in self.made if not ref.expired()}


def _tensors(of: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(of) if isinstance(leaf, torch.Tensor)]


def kept_storages(model) -> set[int]:
    """What may outlive a run: K/V of independent conditions, for the next seed."""
    return {
        tensor.untyped_storage()._cdata
        for entry in identity.between_runs(model)._entries.values()
        for block in entry.blocks.values()
        for tensor in block.tensors
    }


WAYS_OUT = "the device ran out of memory; "


def in_run(error: BaseException) -> bool:
    """Whether it happened in the host's sampling, and not where noise is drawn for it."""
    codes = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return CFGGuider.outer_sample.__code__ in codes


@pytest.mark.compatibility("Faults", "out of memory at any allocation", "works")
@pytest.mark.parametrize("which", ["conditioned", "isolated"])
def test_out_of_memory_at_any_allocation(which, frozen, caplog, request) -> None:
    """The run goes on with its K/V in fewer bytes, as the warning says, or says the ways out."""
    with pytorch_attention():  # the host's other one copes with that itself
        out_of_memory_everywhere(request.getfixturevalue(which), caplog)


@pytest.mark.parametrize("place", [(References, "store", 2), (References, "arrived", 2)])
def test_a_run_with_isolated_references_that_ends_early(isolated, place) -> None:
    before = Before(isolated)
    with fault(place, fail), pytest.raises(Stop):
        sample(isolated, steps=STEPS)
    before.is_still_so()


def out_of_memory_everywhere(model, caplog) -> None:
    before = Before(model)
    with Memory() as memory:
        sample(model, steps=STEPS)
    assert memory.held() <= kept_storages(model)
    assert memory.count > 500
    ended = relieved = 0
    for i in range(OUT_OF_MEMORY_AT):
        identity.between_runs(model).clear()
        caplog.clear()
        with Memory(1 + i * memory.count // OUT_OF_MEMORY_AT) as short:
            try:
                got = sample(model, steps=STEPS)
            except torch.OutOfMemoryError as error:
                assert in_run(error.__cause__ or error) == (WAYS_OUT in str(error))
                ended += 1
            else:
                assert "the device ran out of memory" in caplog.text
                assert relative_error(got, before.picture) < 0.05
                relieved += 1
                del got
        assert short.held() <= kept_storages(model)
        before.is_still_so()
    assert ended > 0 and relieved > ended


def test_out_of_memory_where_only_references_have_keys_and_values(monkeypatch, caplog) -> None:
    """A known part of the picture, whose condition itself is shut out."""
    known, lora = integrated(random_condition(), box()), random_lora("faults.safetensors")
    model = apply(make_model(flux_config(True)), known, lora, condition_scale=0.0)
    kept = editing.cached(model, "auto", 2)
    want = sample(kept, steps=STEPS)
    store, failed = References.store, []

    def once(self, *args):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no memory")
        return store(self, *args)

    monkeypatch.setattr(References, "store", once)
    got = sample(kept, steps=STEPS)
    assert failed and "the device ran out of memory" in caplog.text
    assert relative_error(got, want) < 0.05


def test_what_ran_out_is_free_before_anything_moves(conditioned, monkeypatch) -> None:
    made, free = [], []

    def replacement(args, extra):
        activation = torch.ones(10)
        if not made:
            made.append(weakref.ref(activation))
            raise torch.OutOfMemoryError("no memory")
        return extra["original_block"](args)

    relieve = Run.relieve

    def spy(run, *args):
        free.append(made[0]() is None)
        return relieve(run, *args)

    monkeypatch.setattr(Run, "relieve", spy)
    model = conditioned.clone()
    model.set_model_patch_replace(replacement, "dit", "single_block", 1)
    sample(model, steps=1)
    assert free == [True]


# --- the model leaves in the middle of a run ---------------------------------------------------


def unload() -> None:
    comfy.model_management.unload_all_models()


def free() -> None:
    comfy.model_management.free_memory(1e30, comfy.model_management.get_torch_device())


@pytest.mark.compatibility("Faults", "the model is unloaded between steps", "works")
@pytest.mark.parametrize("leave", [unload, free])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("which", ["conditions", "references"])
def test_the_model_is_unloaded_between_steps(leave, step, which) -> None:
    if which == "conditions":
        before = Before(with_conditions(make_model(flux_config(True))))
    else:
        before = Before(editing.cached(MODELS["FLUX.2 klein"].make(), references="isolated"))

    def callback(at: int, *_: Any) -> None:
        if at == step:
            leave()

    got = sample(before.model, steps=STEPS, callback=callback)
    assert torch.equal(got, before.picture)
    # What it had is gone with the model, also what the run still used then.
    assert identity.between_runs(before.model).nbytes == 0
    before.is_still_so()
    assert identity.between_runs(before.model).nbytes > 0

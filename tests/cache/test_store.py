"""How K/V are kept: fp8, off the device, decided by free memory, rearranged when it runs out."""

import logging
from unittest import mock

import comfy.model_management
import pytest
import torch
from helpers.original import CONDITIONED, fp8_error
from tiny import (
    apply,
    random_condition,
    random_lora,
    recorded_runs,
    relative_error,
    sample,
    with_cache,
)

from omini2_extension.omini2_core.cache.courier import Courier
from omini2_extension.omini2_core.cache.entry import Entry, KeysValues, Storage
from omini2_extension.omini2_core.cache.run_cache import RunCache
from omini2_extension.omini2_core.engine.run import Run
from omini2_extension.omini2_core.host import identity, memory

FP8_TOLERANCE = 2e-2


@pytest.fixture(scope="module", params=["joint", "independent"])
def conditioned(model, request):
    lora = random_lora("store.safetensors")
    one = apply(model, random_condition(), lora, attention=request.param)
    return apply(one, random_condition(3, 2, 1), lora, attention=request.param)


@pytest.mark.parametrize(("file", "name"), CONDITIONED)
def test_fp8_is_close_on_the_reference_cases_and_half_the_size(file, name) -> None:
    error, ratio = fp8_error(file, name)
    assert ratio == 0.5
    assert 0 < error < FP8_TOLERANCE


@pytest.mark.parametrize("largest", [1e-30, 1.0, 448.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fp8_of_any_magnitude(largest, dtype) -> None:
    """Each head has a scale of its own, K and V apart; zeros stay zeros."""
    k = torch.randn(2, 3, 5, 8)
    k = (k / k.abs().amax((-1, -2), keepdim=True) * largest).to(dtype)
    v = torch.zeros_like(k)
    v[:, 1] = 1000
    block = KeysValues.room_for(k, Storage("fp8"))
    block.fill(k, v)
    back_k, back_v = torch.empty_like(k), torch.empty_like(v)
    block.write(back_k, back_v)
    assert block.nbytes == k.numel() + v.numel()
    assert torch.equal(back_v, v)
    if dtype != torch.float16 or largest > 1e-7:
        assert relative_error(back_k.double(), k.double()) < 0.04


@pytest.mark.parametrize("storage", ["model", "fp8"])
def test_off_the_device_nothing_changes(conditioned, storage) -> None:
    """The path of keep_on cpu, with plain copies where there is no GPU."""
    arrived = []
    receive = Courier.receive

    def spy(courier, number):
        blocks = receive(courier, number)
        arrived.append((number, len(blocks)))
        return blocks

    for cfg, batch in ((1.0, 1), (3.0, 2)):
        here = with_cache(conditioned, "auto", 2, storage, "gpu")
        away = with_cache(conditioned, "auto", 2, storage, "cpu")
        want = sample(here, cfg=cfg, batch=batch)
        arrived.clear()
        with recorded_runs() as runs, mock.patch.object(Courier, "receive", spy):
            got = sample(away, cfg=cfg, batch=batch)
        # Not to the bit: K/V that an earlier run left were computed in another batch.
        assert relative_error(got, want) < 1e-6
        assert runs[0].keep_on == "cpu"
        assert [number for number, _ in arrived] == list(range(5)) * 4
        assert arrived[-1][1] == 2 * (1 if cfg == 1.0 else 2)


def test_each_block_is_sent_while_the_one_before_it_runs(conditioned) -> None:
    events = []
    send, receive, block = Courier.send, Courier.receive, Run.block

    def note(name, function):
        def spy(self, *args):
            events.append((name, args[0] if name != "block" else None))
            return function(self, *args)

        return spy

    def inside(run, number, original):
        def noted():
            events.append(("block", None))
            return original()

        return block(run, number, noted)

    with (
        mock.patch.object(Courier, "send", note("send", send)),
        mock.patch.object(Courier, "receive", note("receive", receive)),
        mock.patch.object(Run, "block", inside),
    ):
        sample(with_cache(conditioned, "once", keep_on="cpu"), steps=1)
    want = [("send", 0)]
    for number in range(5):
        want.append(("receive", number))
        want += [("send", number + 1)] if number < 4 else []
        want.append(("block", None))
    assert events == want


def test_an_entry_allocates_once() -> None:
    entry, storage = Entry(2), Storage()
    k = torch.randn(1, 2, 3, 4)
    for _ in range(2):
        entry.restart()
        assert not entry.complete
        for number in range(2):
            entry.store(number, k + number, k, storage)
    first = entry.blocks[0]
    entry.store(0, k, k, storage)
    assert entry.blocks[0] is first
    entry.store(0, k.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), storage)
    assert entry.blocks[0] is not first
    assert entry.complete and entry.refreshes == 2


# --- auto ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "place"), [(1e9, "gpu"), (1e3, "cpu"), (-1e9, "cpu")])
def test_auto_goes_by_free_memory_and_says_so(conditioned, room, place, caplog) -> None:
    caplog.set_level(logging.INFO)
    identity.between_runs(conditioned).clear()
    with (
        mock.patch.object(memory, "room_beside", lambda model, needed: room),
        recorded_runs() as runs,
    ):
        sample(with_cache(conditioned, keep_on="auto"), steps=1)
    assert runs[0].keep_on == place
    assert f"keep_on {place}" in caplog.text


def test_what_other_models_take_counts_as_free(model) -> None:
    class Other:
        load_device = model.load_device

        @staticmethod
        def loaded_size():
            return 5e9

    with (
        mock.patch.object(comfy.model_management, "is_device_cpu", lambda device: False),
        mock.patch.object(comfy.model_management, "get_free_memory", lambda *a, **k: 1e9),
        mock.patch.object(comfy.model_management, "loaded_models", lambda: [Other()]),
    ):
        with_other = memory.room_beside(model, 0)
        with mock.patch.object(comfy.model_management, "loaded_models", lambda: []):
            assert with_other == memory.room_beside(model, 0) + 5e9


def test_what_is_reserved_follows_the_storage(conditioned) -> None:
    """The host is asked for less room with fp8, and for hardly any with cpu."""
    asked = {}
    base = conditioned.model
    a_lot = mock.patch.object(memory, "kv_bytes_per_token", lambda model: 1 << 24)
    required = type(base).memory_required
    for storage, keep_on in (("model", "gpu"), ("fp8", "gpu"), ("model", "cpu")):
        shapes = []
        identity.between_runs(conditioned).clear()

        def spy(self, shape, *args, shapes=shapes, **kwargs):
            shapes.append(shape[2])
            return required(self, shape, *args, **kwargs)

        with a_lot, mock.patch.object(type(base), "memory_required", spy):
            sample(with_cache(conditioned, "once", 5, storage, keep_on), steps=1, cfg=3.0)
        asked[storage, keep_on] = max(shapes)
    assert asked["model", "gpu"] > asked["fp8", "gpu"]
    assert asked["model", "gpu"] > asked["model", "cpu"]


# --- out of memory -------------------------------------------------------------------------------


def failing(model, times: int, first: int = 7):
    """The model with a block that runs out of memory at the first-th call and times - 1 more."""
    calls = []

    def replacement(args, extra):
        calls.append(1)
        if first <= len(calls) < first + times:
            raise torch.cuda.OutOfMemoryError("no memory")
        return extra["original_block"](args)

    patched = model.clone()
    patched.set_model_patch_replace(replacement, "dit", "double_block", 1)
    return patched


@pytest.mark.parametrize(("times", "end"), [(1, ("fp8", "gpu")), (2, ("fp8", "cpu"))])
@pytest.mark.parametrize("first", [1, 3])
def test_out_of_memory_finishes_the_picture(conditioned, times, end, first, caplog) -> None:
    cached = with_cache(conditioned, "auto", 3)
    want = sample(cached)
    with recorded_runs() as runs:
        got = sample(failing(cached, times, first))
    assert (runs[0].storage, runs[0].keep_on) == end
    assert caplog.text.count("the device ran out of memory") == times
    assert 0 < relative_error(got, want) < FP8_TOLERANCE
    assert torch.equal(sample(cached), want)


def test_without_8_bit_floats(conditioned, monkeypatch) -> None:
    """fp8 is refused, and out of memory the K/V leave the device as they are."""
    monkeypatch.setattr(comfy.model_management, "supports_cast", lambda device, dtype: False)
    with pytest.raises(ValueError, match="storage: cpu has no 8-bit floats; set storage to model"):
        sample(with_cache(conditioned, storage="fp8"))
    cached = with_cache(conditioned, "auto", 3)
    want = sample(cached)
    with recorded_runs() as runs:
        got = sample(failing(cached, 1, 3))
    assert (runs[0].storage, runs[0].keep_on) == ("model", "cpu")
    assert relative_error(got, want) < 1e-6


SMALLER = "make the conditions smaller with Compact Tokens or choose a smaller width and height."


@pytest.mark.compatibility("Faults", "out of memory where nothing is left to move", "works")
def test_a_third_time_is_the_end(conditioned) -> None:
    """With the ways out, in an error for which the host unloads all models."""
    cached = with_cache(conditioned, "auto", 3)
    sentence = f"^compression: the device ran out of memory; {SMALLER}$"
    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match=sentence) as caught:
        sample(failing(cached, 3, 2))
    assert str(caught.value.__cause__) == "no memory"


@pytest.mark.parametrize("options", [("off", 5, "model", "auto"), ("once", 5, "model", "cpu")])
def test_where_nothing_can_be_saved_it_is_the_end_at_once(conditioned, options, caplog) -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError, match="compression: the device ran out"):
        sample(failing(with_cache(conditioned, *options), 1, 2))
    assert "so the conditions' K/V are kept" not in caplog.text


def test_what_runs_out_beside_the_model_says_what_can_be_moved(conditioned) -> None:
    """A step can't be tried again where another node asks for the memory."""

    def preview(*args) -> None:
        raise torch.cuda.OutOfMemoryError("no memory")

    sentence = f"^keep_on: .* memory; set keep_on to cpu in Condition Cache, {SMALLER}$"
    with pytest.raises(torch.cuda.OutOfMemoryError, match=sentence):
        sample(with_cache(conditioned, "once"), callback=preview)


def test_without_room_to_store_them_in_fp8_they_leave_the_device(conditioned, monkeypatch) -> None:
    cached = with_cache(conditioned, "auto", 3)
    want, rearrange, calls = sample(cached), Entry.rearrange, []

    def overflow(entry, storage, device):
        calls.append(storage.keep_on)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("no memory")
        rearrange(entry, storage, device)

    monkeypatch.setattr(Entry, "rearrange", overflow)
    with recorded_runs() as runs:
        got = sample(failing(cached, 1, 3))
    assert (runs[0].storage, runs[0].keep_on) == ("fp8", "cpu")
    assert calls[:4] == ["gpu", "gpu", "cpu", "cpu"]
    assert 0 < relative_error(got, want) < FP8_TOLERANCE


def test_while_k_v_are_being_computed(conditioned, monkeypatch) -> None:
    """The first store overflows: what there is of an entry is computed anew."""
    cached = with_cache(conditioned, "once")
    want = sample(cached)
    keep, calls = RunCache.store, []

    def overflow(cache, entry, number, k, v):
        calls.append(1)
        if len(calls) == 4:
            raise torch.cuda.OutOfMemoryError("no memory")
        keep(cache, entry, number, k, v)

    monkeypatch.setattr(RunCache, "store", overflow)
    with recorded_runs() as runs:
        got = sample(cached)
    assert runs[0].storage == "fp8"
    assert 0 < relative_error(got, want) < FP8_TOLERANCE

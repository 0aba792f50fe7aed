"""What a step with cached conditions does beside FLUX's own work: nothing but attention."""

from collections import Counter
from unittest import mock

import comfy.ldm.flux.layers
import comfy.ldm.flux.model
import pytest
import torch
from tiny import (
    apply,
    pytorch_attention,
    random_condition,
    random_lora,
    sample,
    with_cache,
)
from torch.utils._python_dispatch import TorchDispatchMode

from omini2_extension.omini2_core.engine import run as engine_run
from omini2_extension.omini2_core.engine.run import Run
from omini2_extension.omini2_core.flux1.blocks import DoubleBlock
from omini2_extension.omini2_core.host import identity

READS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal")
VIEWS = ("slice", "alias", "select", "detach", "view", "expand", "transpose", "unbind")


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to do, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def last_evaluation(model, **options) -> Counter[str]:
    """Operations of a run's last call of the model, the hooks around it included."""
    counts = []
    forward = comfy.ldm.flux.model.Flux.forward

    def spy(*args, **kwargs):
        with Operations() as operations:
            out = forward(*args, **kwargs)
        counts.append(operations.count)
        return out

    with mock.patch.object(comfy.ldm.flux.model.Flux, "forward", spy):
        sample(model, steps=3, **options)
    return counts[-1]


def reads(model) -> int:
    """How often its last evaluation waits for the device."""
    count = last_evaluation(model)
    return sum(count[name] for name in READS)


def with_conditions(model, lora, attention, **options):
    for seed, (h, w) in enumerate([(3, 4), (3, 4), (2, 5)]):
        condition = random_condition(h, w, seed, placement="fit")
        model = apply(model, condition, lora, attention=attention, **options)
    return model


@pytest.mark.parametrize("options", [{}, {"batch": 2}, {"batch": 2, "cfg": 3.0}], ids=str)
@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_a_cached_step_only_joins_k_and_v(model, lora, attention, options) -> None:
    """Nothing is read from the device, looked up, embedded, concatenated or computed again."""
    conditioned = with_cache(with_conditions(model, lora, attention), "once")
    with pytorch_attention():
        plain = last_evaluation(model, **options)
        cached = last_evaluation(conditioned, **options)
    cached.subtract(plain)
    chunks = 2 if "cfg" in options else 1
    extra = {name: n for name, n in cached.items() if n and name not in VIEWS}
    copies = 2 * 5 * (1 + 3 * chunks)  # of K and V in 5 blocks: the main branch's, 3 conditions'
    # "to": the pooled text's format, which is right already.
    assert extra == {"copy_": copies, "new_empty": 2 * 5, "to": 1}


@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_nothing_is_read_from_the_device(model, lora, attention) -> None:
    """Unless conditions come and go, or are refreshed every n steps: then one number a step."""
    conditioned = with_conditions(model, lora, attention)
    plain = reads(model)
    assert reads(with_cache(conditioned, "once")) == plain
    assert reads(conditioned) == plain
    assert reads(with_cache(conditioned, "every_n_steps", 100)) == plain + 1
    ending = with_conditions(model, lora, attention, end_percent=0.99)
    assert reads(with_cache(ending, "once")) == plain + 1


@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_positions_are_made_once(model, lora, attention) -> None:
    made = []
    rope = comfy.ldm.flux.layers.EmbedND.forward

    def spy(self, ids):
        made.append(ids.shape[1])
        return rope(self, ids)

    conditioned = with_conditions(model, lora, attention)
    with mock.patch.object(comfy.ldm.flux.layers.EmbedND, "forward", spy):
        sample(conditioned, steps=4)
    assert sorted(made) == [10, 12, 12] + 4 * [5 + 36]


def test_the_last_block_stops_at_k_and_v(model, lora) -> None:
    """Neither a joint condition's attention nor its queries and MLP are computed there."""
    queries = []
    joint_attention = engine_run.joint_attention

    def spy(attend, partial, together, *args):
        queries.append(len(together))
        return joint_attention(attend, partial, together, *args)

    conditioned = with_conditions(model, lora, "joint")
    with mock.patch.object(engine_run, "joint_attention", spy):
        sample(conditioned, steps=1)
    assert queries == [3] * 4  # of 5 blocks


# --- prefill alone -------------------------------------------------------------------------------


def test_conditions_of_one_lora_and_length_are_one_batch(model, lora) -> None:
    """12, 12 and 10 tokens with one LoRA, 12 with another: three batches, block after block."""
    other = random_lora("hot_other.safetensors", seed=1)
    conditioned = with_conditions(model, lora, "independent")
    condition = random_condition(3, 4, 7, placement="fit")
    conditioned = with_cache(apply(conditioned, condition, other, attention="independent"))
    shapes = []
    halves = DoubleBlock.halves

    def spy(block, linear, x, *args):
        shapes.append((block.path, tuple(x.shape[:2])))
        return halves(block, linear, x, *args)

    identity.between_runs(model).clear()
    with mock.patch.object(DoubleBlock, "halves", spy):
        sample(conditioned, steps=3)
    batches = [(2, 12), (1, 10), (1, 12)]

    want = [(f"double_blocks.{i}", shape) for i in range(2) for shape in batches]
    assert shapes == want


def test_it_sees_neither_text_nor_picture(model, lora) -> None:
    """All of it is over before the model's first block begins."""
    events = []
    block = Run.block

    def spy(run, *args):
        events.append(("block", run.cache.nbytes))
        return block(run, *args)

    conditioned = with_cache(with_conditions(model, lora, "independent"))
    with mock.patch.object(Run, "block", spy):
        sample(conditioned, steps=2)
    assert {stored for _, stored in events} == {(12 + 12 + 10) * 2 * 5 * 32 * 4}


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_compiled_code_is_the_models_own(model, lora, attention) -> None:
    """Graphs break at the hooks, before, in and behind each block's attention, and nowhere else.

    What conditions need is never part of a graph, so their coming and going recompiles nothing.
    """
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    def graphs(of) -> list[str]:
        sources = []

        def backend(module, _):
            stacks = [node.meta.get("stack_trace") or "" for node in module.graph.nodes]
            sources.append("\n".join(stacks))
            return module.forward

        torch._dynamo.reset()
        with pytorch_attention():
            sample(TorchCompileModel.execute(of, backend)[0], steps=3)
        return sources

    conditioned = with_cache(apply(model, random_condition(), lora, attention=attention), "auto", 2)
    sources = graphs(conditioned)
    assert sources
    assert not [source for source in sources if "omini2_core" in source.split("File")[-1]]
    # Two kinds of block, before and behind attention; input and output; nothing per step or block.
    assert len(sources) <= MOST_GRAPHS


MOST_GRAPHS = 15

"""LoRA files read key by key, and deltas on layers whose result can be worked out."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.lora.deltas import (
    Delta,
    Linears,
    SharedLinears,
    Target,
    outputs_of,
    summed,
)
from omini2_extension.omini2_core.lora.family import EASYCONTROL, OMINICONTROL
from omini2_extension.omini2_core.lora.file import BranchLora, load_lora, read_safetensors

# Two modules of the file's are two slices of one layer, as q and k are.
TARGETS = {
    "block.to_q": Target("block.qkv", 0, 3, 2),
    "block.to_k": Target("block.qkv", 3, 3, 2),
    "embed": Target("img_in", 0, 4, 5),
    "transformer_blocks.0.attn.to_q": Target("double.qkv", 0, 3, 2),
    "transformer_blocks.0.attn.to_out.0": Target("double.proj", 0, 3, 3),
}


def pair(module, rank=2, out=3, features=2):
    return {
        f"transformer.{module}.lora_A.weight": torch.randn(rank, features),
        f"transformer.{module}.lora_B.weight": torch.randn(out, rank),
    }


def written(folder, tensors, name="file.safetensors", metadata=None):
    save_file(tensors, folder / name, metadata)
    return folder / name


def load(folder, tensors, foreign=(), **options):
    return load_lora(written(folder, tensors, **options), TARGETS, foreign)


# --- files -------------------------------------------------------------------------------------


def test_every_key_finds_its_slice(tmp_path) -> None:
    tensors = pair("block.to_q") | pair("block.to_k", rank=4) | pair("embed", 1, 4, 5)
    tensors["transformer.block.to_k.alpha"] = torch.tensor(2.0)
    lora = load(tmp_path, tensors, metadata={"made": "by hand"})
    assert (lora.name, lora.metadata) == ("file.safetensors", {"made": "by hand"})
    assert lora.family is OMINICONTROL
    assert sorted(lora.deltas) == ["block.qkv", "img_in"]
    q, k = sorted(lora.deltas["block.qkv"], key=lambda delta: delta.start)
    assert (q.start, q.scale, q.reads_output) == (0, 1.0, False)
    assert (k.start, k.scale, k.reads_output) == (3, 0.5, False)  # alpha over rank
    assert torch.equal(q.down, tensors["transformer.block.to_q.lora_A.weight"])
    assert torch.equal(q.up, tensors["transformer.block.to_q.lora_B.weight"])
    assert lora.parameters == 2 * (2 + 3) + 4 * (2 + 3) + (5 + 4)


def easy(linear, condition=0, features=2):
    start = f"transformer_blocks.0.attn.processor.{linear}_loras.{condition}"
    return {
        f"{start}.down.weight": torch.zeros(2, features),
        f"{start}.up.weight": torch.ones(3, 2),
    }


def test_easycontrols_projection_reads_the_output(tmp_path) -> None:
    lora = load(tmp_path, easy("q") | easy("proj", features=3))
    assert lora.family is EASYCONTROL and lora.independent
    assert [delta.reads_output for delta in lora.deltas["double.qkv"]] == [False]
    assert [delta.reads_output for delta in lora.deltas["double.proj"]] == [True]


def test_a_single_condition_may_have_any_number(tmp_path) -> None:
    lora = load(tmp_path, easy("q", 2))
    assert torch.equal(lora.deltas["double.qkv"][0].up, torch.ones(3, 2))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (easy("q") | easy("q", 1), "holds LoRAs for several conditions"),
        (
            {f"x{i}.lora_A.weight": torch.zeros(1, 1) for i in range(4)},
            "is no condition LoRA for FLUX.1: .* belongs to x0.lora_A.weight, x1.lora_A.weight, "
            "x2.lora_A.weight, x3.lora_A.weight; choose a LoRA made for OminiControl or Easy",
        ),
        (
            {f"x{i}.lora_A.weight": torch.zeros(1, 1) for i in range(6)},
            "belongs to x0.*, x3.lora_A.weight and 2 more; choose",
        ),
        (pair("block.to_q") | pair("text"), "is an ordinary LoRA, .*transformer.text.lora_A"),
        (pair("text") | pair("noise"), "is an ordinary LoRA, .*transformer.noise.lora_A"),
        (pair("block.to_q", features=3), r"another size: block.to_q is \(3, 2\) x \(2, 3\)"),
        (pair("block.to_q", out=4), r"this model needs \(3, rank\) x \(rank, 2\)"),
        (pair("block.to_q", rank=0), "another size"),
        (
            pair("block.to_q") | {"transformer.block.to_q.lora_B.weight": torch.zeros(3, 1)},
            "another size",
        ),
        (
            pair("block.to_q") | {"transformer.block.to_q.lora_A.weight": torch.zeros(2, 2, 1)},
            "another size",
        ),
        (
            pair("block.to_q") | {"transformer.block.to_q.lora_B.weight": torch.zeros(3, 2, 1)},
            "another size",
        ),
        (
            {"transformer.block.to_q.lora_A.weight": torch.zeros(2, 2)},
            "has only half of the LoRA for block.to_q",
        ),
        (
            {"transformer.block.to_q.lora_B.weight": torch.zeros(3, 2)},
            "has only half of the LoRA for block.to_q",
        ),
    ],
)
def test_files_that_are_refused(tmp_path, tensors, said) -> None:
    with pytest.raises(Omini2Error, match=rf"^lora_name: file\.safetensors .*{said}"):
        load(tmp_path, tensors, foreign=["text", "other"])


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)  # fmt: skip
def test_formats_of_a_lora(tmp_path, dtype) -> None:
    (delta,) = load(tmp_path, {k: v.to(dtype) for k, v in pair("embed", 1, 4, 5).items()}).deltas[
        "img_in"
    ]
    assert delta.down.dtype == delta.up.dtype == dtype


def embed(**parts):
    """A LoRA of rank 1 for `embed`, with other parts."""
    tensors = pair("embed", 1, 4, 5)
    return tensors | {f"transformer.embed.{name}": part for name, part in parts.items()}


@pytest.mark.parametrize(
    "tensors",
    [
        {k: v.int() for k, v in embed().items()},
        embed(**{"lora_A.weight": torch.ones(1, 5, dtype=torch.int64)}),
        embed(alpha=torch.ones(2)),
        embed(alpha=torch.ones(1, 0)),
    ],
)
def test_a_lora_of_whole_numbers_or_with_several_alphas_is_refused(tmp_path, tensors) -> None:
    said = r"^lora_name: file\.safetensors holds something else than a LoRA for embed \(.*(F|I)\d+"
    with pytest.raises(Omini2Error, match=said):
        load(tmp_path, tensors)


def test_the_largest_rank(tmp_path) -> None:
    load(tmp_path, pair("embed", 16384, 4, 5))
    with pytest.raises(Omini2Error, match="another size"):
        load(tmp_path, pair("embed", 16385, 4, 5))


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "alpha"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lora_holds_numbers(tmp_path, part, value) -> None:
    tensors = embed(alpha=torch.ones(1))
    tensors[f"transformer.embed.{part}"].view(-1)[0] = value
    with pytest.raises(Omini2Error, match=r"holds NaN or infinite values for embed; it is damaged"):
        load(tmp_path, tensors)


def test_a_module_comes_once(tmp_path) -> None:
    tensors = embed() | {"embed.lora_A.weight": torch.ones(1, 5)}
    keys = r"(transformer\.)?embed\.lora_A\.weight"
    with pytest.raises(Omini2Error, match=f"holds embed twice, under {keys} and {keys}; download"):
        load(tmp_path, tensors)


def test_reading_a_file(tmp_path) -> None:
    tensors, metadata = read_safetensors(written(tmp_path, pair("embed"), "a.sft"))
    assert sorted(tensors) == sorted(pair("embed")) and metadata == {}
    for name, content, said in (
        ("a.bin", b"", r"a\.bin is not a \.safetensors file; .*torch\.load\(\"a\.bin\", .*\"a\.sa"),
        ("b.sft", b"x", r"b\.sft can't be read as a safetensors file"),
        ("c.safetensors", b"\x02" + bytes(7) + b"{}", r"c\.safetensors holds no tensors"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Omini2Error, match=f"^lora_name: {said}"):
            read_safetensors(tmp_path / name)
    with pytest.raises(Omini2Error, match=r"^lora_name: none\.safetensors can't be read"):
        read_safetensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("metadata", "want"),
    [({}, False), ({"omini2.independent_condition": "True"}, True),
     ({"omini2.independent_condition": "1"}, True),
     ({"omini2.independent_condition": "false"}, False)],
)  # fmt: skip
def test_what_a_file_says_of_its_mask(metadata, want) -> None:
    assert BranchLora("a", {}, metadata).independent is want
    assert BranchLora("a", {}, metadata, EASYCONTROL).independent


def test_a_digest_names_what_a_lora_does() -> None:
    down, up = torch.randn(2, 3), torch.randn(4, 2)

    def named(name="a", **changes) -> str:
        values = {"start": 0, "down": down, "up": up, "path": "x"} | changes
        path = values.pop("path")
        return BranchLora(name, {path: [Delta(**values)]}, {}).digest

    assert named() == named(name="b", down=down.clone())
    others = [
        named(start=1),
        named(down=down + 1),
        named(up=up + 1),
        named(scale=0.5),
        named(reads_output=True),
        named(path="y"),
    ]
    assert len({named(), *others}) == 7
    one, two = [Delta(0, down, up)], [Delta(1, down, up)]
    assert (
        BranchLora("a", {"x": one, "y": two}, {}).digest
        == BranchLora("a", {"y": two, "x": one}, {}).digest
    )


# --- deltas ------------------------------------------------------------------------------------


def delta(start, out, rank=2, features=5, **options):
    return Delta(start, torch.randn(rank, features), torch.randn(out, rank), **options)


def dense(deltas, out, x, y):
    """What the deltas that read x, and then those that read y, make of y."""
    for by_output in (False, True):
        read = y if by_output else x
        added = torch.zeros_like(y)
        for d in deltas:
            if d.reads_output == by_output:
                change = (read @ d.down.t() @ d.up.t()) * d.scale
                added[..., d.start : d.start + len(d.up)] += change
        y = y + added
    return y


def linears(deltas):
    return Linears(deltas, torch.device("cpu"), torch.float32)


def test_deltas_of_one_layer_add_up() -> None:
    layer, x = nn.Linear(5, 8), torch.randn(2, 3, 5)
    deltas = [delta(0, 3), delta(2, 4, rank=1, scale=0.5), delta(5, 3, scale=2.0)]
    patched = linears({"a": deltas, "empty": []})
    assert torch.allclose(patched("a", layer, x), dense(deltas, 8, x, layer(x)), atol=1e-5)
    assert torch.equal(patched("b", layer, x), layer(x))
    assert torch.equal(patched("empty", layer, x), layer(x))


def test_deltas_that_read_the_output_read_the_completed_one() -> None:
    layer, x = nn.Linear(5, 5), torch.randn(3, 5)
    deltas = [delta(0, 5, reads_output=True), delta(1, 4), delta(2, 2, rank=3, reads_output=True)]
    got = linears({"a": deltas})("a", layer, x)
    assert torch.allclose(got, dense(deltas, 5, x, layer(x)), atol=1e-5)
    only = linears({"a": deltas[:1]})("a", layer, x)
    assert torch.allclose(only, dense(deltas[:1], 5, x, layer(x)), atol=1e-5)


def test_deltas_are_brought_to_the_layers_format() -> None:
    half = delta(0, 8, scale=0.3)
    half = Delta(0, half.down.half(), half.up.half(), 0.3)
    layer, x = nn.Linear(5, 8), torch.randn(3, 5)
    exact = layer(x) + x @ half.down.float().t() @ (half.up.float().t() * 0.3)
    assert torch.allclose(linears({"a": [half]})("a", layer, x), exact, atol=1e-6)


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (0, 3), (2, 3), (3, 6), (6, 8), (7, 8)])
def test_some_of_a_layers_outputs(start, stop) -> None:
    layer, x = nn.Linear(5, 8), torch.randn(3, 5)
    deltas = [delta(0, 3), delta(3, 2, rank=1, scale=0.5), delta(4, 3)]
    patched, asked = linears({"a": deltas}), []

    def outputs(module, x, start, stop):
        asked.append((start, stop))
        return module(x)[..., start:stop]

    want = dense(deltas, 8, x, layer(x))[..., start:stop]
    for _ in range(2):  # the second call finds what the first one made
        assert torch.allclose(patched.outputs("a", layer, x, start, stop, outputs), want, atol=1e-5)
        got = patched.outputs("b", layer, x, start, stop, outputs)
        assert torch.equal(got, layer(x)[..., start:stop])
    assert asked == [(start, stop)] * 4
    # Another part of the same layer is another stack.
    rest = patched.outputs("a", layer, x, 1, 5, outputs)
    assert torch.allclose(rest, dense(deltas, 8, x, layer(x))[..., 1:5], atol=1e-5)


def test_parts_of_deltas() -> None:
    deltas = [delta(0, 3), delta(3, 2), delta(5, 3)]
    parts = outputs_of(deltas, 2, 5)
    assert [(part.start, len(part.up)) for part in parts] == [(0, 1), (1, 2)]
    assert torch.equal(parts[0].up, deltas[0].up[2:])
    assert torch.equal(parts[1].up, deltas[1].up)
    assert outputs_of(deltas, 3, 5)[0].start == 0 and len(outputs_of(deltas, 3, 5)) == 1


def test_a_lora_is_on_the_device_while_it_is_needed() -> None:
    shared, like = SharedLinears({"a": [delta(0, 8)]}), torch.zeros(1)
    assert shared._linears is None
    first = shared.on(like)
    assert shared._linears is not None and shared.on(like) is first
    shared.release()
    assert shared._linears is None
    assert shared.on(like) is not first


def test_total_deltas_are_all_of_them_scaled() -> None:
    one, two, three = delta(0, 3), delta(1, 3, scale=0.5), delta(2, 3, reads_output=True)
    total = summed(({"a": [one], "b": [two]}, 2.0), ({"a": [three]}, -1.0), ({"a": [one]}, 0.0))
    assert sorted(total) == ["a", "b"]
    scales = [(d.start, d.scale, d.reads_output) for d in total["a"] + total["b"]]
    assert scales == [(0, 2.0, False), (2, -1.0, True), (1, 1.0, False)]
    assert one.scale == 1.0 and total["a"][0].down is one.down

"""Writes docs/spellings.md, how a LoRA file may be written: `python -m dev.docs.spellings`.

Each spelling is tried: the same LoRA is written so, and chosen in Apply Omini2 LoRA.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dev import markdown
from dev.paths import ROOT

PAGE = ROOT / "docs" / "spellings.md"
Tensors = dict[str, Tensor]
SAME, RUNS, DOUBTED = "runs, bit for bit as the published spelling", "runs", "runs, with a warning"
INTRODUCTION = """\
# How a LoRA file may be written

Written by `python -m dev.docs.spellings`, which writes one LoRA in each of these ways and chooses
it in *Apply Omini2 LoRA*; a test holds this page to what comes of it. The editor says the same of a
file that is refused.

"""


@dataclass(frozen=True)
class Spelling:
    """A way of writing a LoRA file.

    Attributes:
        write: the published file's tensors -> this one's.
        name: the file's.
        easy: whether it is EasyControl's LoRA, not OminiControl's.
        same: whether it has to be the published one's bit for bit.
    """

    words: str
    write: Callable[[Tensors], Tensors]
    name: str = "spelt.safetensors"
    easy: bool = False
    same: bool = True


def _renamed(*changes: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def write(tensors: Tensors) -> Tensors:
        written = {}
        for key, value in tensors.items():
            for pattern, by in changes:
                key = re.sub(pattern, by, key)
            written[key] = value
        return written

    return write


def _prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return _renamed((r"^(transformer\.)?", prefix))


def _with(**more: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{key.replace("__", "."): t for key, t in more.items()}}


def _alphas(make: Callable[[int], Tensor], then: Any = lambda tensors: tensors) -> Any:
    """With an alpha of the rank beside every pair, which changes nothing."""

    def write(tensors: Tensors) -> Tensors:
        alphas = {
            key.replace("lora_A.weight", "alpha"): make(len(value))
            for key, value in tensors.items()
            if key.endswith("lora_A.weight")
        }
        written: Tensors = then({**tensors, **alphas})
        return written

    return write


def _down_up(letters: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (r"\.lora_A\.", f"{letters}down."), (r"\.lora_B\.", f"{letters}up.")


# ComfyUI's layer -> diffusers' layers, whose outputs it holds one after the other.
_FUSED = {
    "double_blocks": (
        "transformer_blocks",
        {
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "img_attn.proj": ("attn.to_out.0",),
            "img_mod.lin": ("norm1.linear",),
            "img_mlp.2": ("ff.net.2",),
        },
    ),
    "single_blocks": (
        "single_transformer_blocks",
        {
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation.lin": ("norm.linear",),
        },
    ),
}


def shared(tensors: Tensors) -> Tensors:
    """The published spelling of a LoRA whose q, k, v (and MLP) have one A, as fused ones have."""
    written = dict(tensors)
    for key in tensors:
        found = re.fullmatch(r"(.*\.)attn\.to_q(\.lora_A\.weight)", key)
        if found:
            for layer in ("attn.to_k", "attn.to_v", "proj_mlp"):
                other = f"{found[1]}{layer}{found[2]}"
                if other in tensors:
                    written[other] = tensors[key].clone()
    return written


def _fused(then: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    """By ComfyUI's own layers."""

    def write(tensors: Tensors) -> Tensors:
        tensors = shared(tensors)
        written = {}
        for part in ("A", "B"):
            ending = f".lora_{part}.weight"
            written[f"img_in{ending}"] = tensors[f"transformer.x_embedder{ending}"]
            for kind, (theirs, layers) in _FUSED.items():
                blocks = (re.match(rf"transformer\.{theirs}\.(\d+)\.", key) for key in tensors)
                for number in {found[1] for found in blocks if found}:
                    for layer, names in layers.items():
                        each = [
                            tensors[f"transformer.{theirs}.{number}.{n}{ending}"] for n in names
                        ]
                        whole = each[0] if part == "A" else torch.cat(each)
                        written[f"{kind}.{number}.{layer}{ending}"] = whole
        return then(written)

    return write


def _underscored(prefix: str) -> Callable[[Tensors], Tensors]:
    """As kohya's: what names the module with underscores."""

    def write(tensors: Tensors) -> Tensors:
        written = {}
        for key, value in tensors.items():
            module, part = re.fullmatch(
                r"(?:transformer\.)?(.+)\.(lora_[AB]\.weight|alpha)", key
            ).groups()  # type: ignore[union-attr]
            part = part.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
            written[f"{prefix}{module.replace('.', '_')}.{part}"] = value
        return written

    return write


def _cast(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value.to(dtype) for key, value in tensors.items()}


def _rank(rank: Callable[[int], int]) -> Callable[[Tensors], Tensors]:
    """Other ranks, the rest being zeros or cut off."""

    def write(tensors: Tensors) -> Tensors:
        written = {}
        for number, (key, value) in enumerate(sorted(tensors.items())):
            dim, n = int(key.endswith("B.weight")), rank(number // 2)
            size = list(value.shape)
            size[dim] = n
            other = value.new_zeros(size)
            kept = min(n, value.shape[dim])
            other.narrow(dim, 0, kept).copy_(value.narrow(dim, 0, kept))
            written[key] = other
        return written

    return write


_Q = "transformer.transformer_blocks.0.attn.to_q"
_TWO, _ONE = torch.ones(2, 2), torch.ones(1)
PLAIN = _renamed()
SPELLINGS = (
    # names
    Spelling("`transformer.`, as published", PLAIN),
    Spelling("no prefix", _prefixed("")),
    Spelling("prefix `base_model.model.`", _prefixed("base_model.model.")),
    Spelling("prefix `base_model.model.transformer.`", _prefixed("base_model.model.transformer.")),
    Spelling("prefix `module.`", _prefixed("module.")),
    Spelling("prefix `module.transformer.`", _prefixed("module.transformer.")),
    Spelling("prefix `diffusion_model.`", _prefixed("diffusion_model.")),
    Spelling("adapter `lora_A.default.weight`", _renamed((r"(lora_[AB])", r"\1.default"))),
    Spelling("adapter of any name, `lora_A.edges.weight`", _renamed((r"(lora_[AB])", r"\1.edges"))),
    Spelling("`base_model.model.` and an adapter", lambda tensors: _renamed(
        (r"^transformer\.", "base_model.model."), (r"(lora_[AB])", r"\1.default"))(tensors)),
    Spelling("`lora_A` without `.weight`", _renamed((r"\.weight$", ""))),
    Spelling("`lora_down`, `lora_up`", _renamed(*_down_up(".lora_"))),
    Spelling("`lora_down`, `lora_up` and `alpha`", _alphas(
        lambda rank: torch.tensor(float(rank)), _renamed(*_down_up(".lora_")))),
    Spelling("`lora.down`, `lora.up`", _renamed(*_down_up(".lora."))),
    Spelling("`lora.down`, `lora.up` and `alpha`", _alphas(
        lambda rank: torch.tensor(float(rank)), _renamed(*_down_up(".lora.")))),
    Spelling("`to_q_lora.down`, `to_q_lora.up`", _renamed(*_down_up("_lora."))),
    Spelling("`lora_linear_layer.down`", _renamed(*_down_up(".lora_linear_layer."))),
    Spelling("kohya's `lora_unet_transformer_blocks_0_attn_to_q`", _underscored("lora_unet_")),
    Spelling("kohya's, with `alpha`", _alphas(
        lambda rank: torch.tensor(float(rank)), _underscored("lora_unet_"))),
    Spelling("`lora_transformer_transformer_blocks_0_attn_to_q`",
             _underscored("lora_transformer_")),
    Spelling("ComfyUI's `diffusion_model.double_blocks.0.img_attn.qkv`",
             _fused(_renamed((r"^", "diffusion_model.")))),
    Spelling("ComfyUI's `double_blocks.0.img_attn.qkv`", _fused(PLAIN)),
    Spelling("ComfyUI's `model.diffusion_model.double_blocks...`",
             _fused(_renamed((r"^", "model.diffusion_model.")))),
    Spelling("ComfyUI's, with `lora_down`, `lora_up`", _fused(_renamed(*_down_up(".lora_")))),
    Spelling("ComfyUI's `lora_unet_double_blocks_0_img_attn_qkv`",
             _fused(_underscored("lora_unet_"))),
    # numbers
    Spelling("`alpha` without a dimension", _alphas(lambda rank: torch.tensor(float(rank)))),
    Spelling("`alpha` of one dimension", _alphas(lambda rank: torch.tensor([float(rank)]))),
    Spelling("`alpha` in fp16", _alphas(lambda rank: torch.tensor(float(rank)).half())),
    Spelling("`alpha` as a whole number", _alphas(lambda rank: torch.tensor(rank))),
    Spelling("fp64", _cast(torch.float64), same=False),
    Spelling("fp16", _cast(torch.float16), same=False),
    Spelling("bf16", _cast(torch.bfloat16), same=False),
    Spelling("fp8 e4m3", _cast(torch.float8_e4m3fn), same=False),
    Spelling("fp8 e5m2", _cast(torch.float8_e5m2), same=False),
    Spelling("rank 1", _rank(lambda number: 1), same=False),
    Spelling("rank 128", _rank(lambda number: 128), same=False),
    Spelling("a rank of its own for each layer", _rank(lambda number: 1 + number % 7), same=False),
    # files
    Spelling("`.sft`", PLAIN, "spelt.sft"),
    Spelling("`.SAFETENSORS`", PLAIN, "spelt.SAFETENSORS"),
    Spelling("`.pt`", PLAIN, "spelt.pt"),
    Spelling("`.bin`, nested under `state_dict`", PLAIN, "spelt.bin"),
    Spelling("`.ckpt`, nested under `state_dict`", PLAIN, "spelt.ckpt"),
    # EasyControl's
    Spelling("EasyControl's, as published", PLAIN, easy=True),
    Spelling("EasyControl's after `transformer.`", _prefixed("transformer."), easy=True),
    Spelling("EasyControl's after `module.`", _prefixed("module."), easy=True),
    Spelling("EasyControl's, index 1 only", _renamed((r"_loras\.0\.", "_loras.1.")), easy=True),
    Spelling("EasyControl's of two conditions",
             lambda tensors: {**tensors, **_renamed((r"_loras\.0\.", "_loras.1."))(tensors)},
             easy=True),
    # what is no condition LoRA
    Spelling("DoRA, `dora_scale`", _with(**{f"{_Q}.dora_scale": _TWO})),
    Spelling("DoRA, `lora_magnitude_vector`", _with(**{f"{_Q}.lora_magnitude_vector": _ONE})),
    Spelling("`lora_B.bias`", _with(**{f"{_Q}.lora_B.bias": _ONE})),
    Spelling("fp8 with `scale_weight`", _with(**{f"{_Q}.scale_weight": _ONE})),
    Spelling("LoKr", lambda _: {f"{_Q}.lokr_w1": _TWO, f"{_Q}.lokr_w2": _TWO}),
    Spelling("LoHa", lambda _: {f"{_Q}.hada_w1_a": _TWO, f"{_Q}.hada_w1_b": _TWO}),
    Spelling("XLabs'", lambda _: {
        f"double_blocks.0.processor.qkv_lora1.{part}.weight": _TWO for part in ("down", "up")}),
    Spelling("with a text encoder's", _with(
        lora_te1_text_model_encoder_layers_0_mlp_fc1__lora_down__weight=_TWO)),
    Spelling("DreamO's", _with(dreamo_task_embedding__weight=_TWO)),
    Spelling("an ordinary LoRA", _with(**{
        f"{_Q[:-4]}add_q_proj.lora_{part}.weight": _TWO for part in "AB"})),
    Spelling("an ordinary LoRA of attention only", lambda tensors: {
        key: value for key, value in tensors.items() if re.search(r"attn\.to_[qkv]\.", key)},
        same=False),
)  # fmt: skip


def outcome(spelling: Spelling) -> str:
    """What Apply Omini2 LoRA makes of it; the extension and the tests' tiny models are loaded."""
    import folder_paths
    from safetensors.torch import save
    from tiny import apply, flux_config, make_model, random_condition, reference

    from omini2_extension.omini2_core import errors
    from omini2_extension.omini2_core.host.attach import get_setup

    published = reference("easycontrol").under("lora.e0.") if spelling.easy else (
        reference("dev_like").under("lora.a."))  # fmt: skip
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    model, condition = make_model(flux_config(True)), random_condition()

    def loaded(name: str, tensors: Tensors, family: str = "auto") -> Any:
        path = folder / name
        tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
        if path.suffix.lower() in (".safetensors", ".sft"):
            path.write_bytes(save(tensors))
        else:
            torch.save({"state_dict": tensors} if path.suffix != ".pt" else tensors, path)
        folder_paths.filename_list_cache.clear()
        return get_setup(apply(model, condition, name, family=family)).branches[0].lora

    said: list[str] = []
    try:
        with mock.patch.object(errors, "_listeners", [lambda sentence, _: said.append(sentence)]):
            lora = loaded(spelling.name, spelling.write(published))
    except errors.Omini2Error as error:
        return str(error).partition(": ")[2].replace(Path(spelling.name).stem, "FILE")
    if any("attention only" in sentence for sentence in said):
        return DOUBTED
    if not spelling.same:
        return RUNS
    plain = [loaded("plain.safetensors", make(published)) for make in (PLAIN, shared)]
    return SAME if lora.digest in {each.digest for each in plain} else "runs, but not the same"


def page(outcomes: list[str]) -> str:
    """The docs' page."""
    rows = [
        (spelling.words, re.sub(r"\|", r"\\|", words))
        for spelling, words in zip(SPELLINGS, outcomes, strict=True)
    ]
    return INTRODUCTION + markdown.table(("file", "what comes of it"), rows) + "\n"


def main() -> None:
    from dev.load import load_extension, load_host

    load_host()
    load_extension()
    sys.path.append(str(ROOT / "tests"))
    import folder_paths

    with tempfile.TemporaryDirectory() as folder:
        folder_paths.folder_names_and_paths["loras"] = (
            [folder],
            folder_paths.supported_pt_extensions,
        )
        text = page([outcome(each) for each in SPELLINGS])
    PAGE.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

"""What the keys of a LoRA file name, in every spelling that is a mere renaming.

Trainers spell the same tensor in a dozen ways: with a prefix or several, with an adapter's name,
with dots or underscores, by diffusers' modules or by ComfyUI's, in which q, k and v are one layer.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

# Ways of writing keys: lora_A and lora_B or what stands for them, and EasyControl's processors.
PLAIN, PROCESSOR = "plain", "processor"


class KeyName(NamedTuple):
    """What a key of a LoRA file names.

    Attributes:
        modules: diffusers' names of the linear layers; several where the LoRA is one for all of
            them, whose outputs are B's rows in this order.
        tensor: "down" (A), "up" (B) or "alpha".
        way: how the key is written, ``PLAIN`` or ``PROCESSOR``.
        condition: which condition of the file it belongs to, from 0.
    """

    modules: tuple[str, ...]
    tensor: str
    way: str = PLAIN
    condition: int = 0


# ComfyUI's linear layers -> diffusers', below a block.
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_EMBEDDERS = {"time": "timestep", "vector": "text", "guidance": "guidance"}
_AROUND = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
} | {
    f"{ours}_in.{layer}_layer": (f"time_text_embed.{theirs}_embedder.linear_{number}",)
    for ours, theirs in _EMBEDDERS.items()
    for number, layer in ((1, "in"), (2, "out"))
}
# Kinds of blocks: ComfyUI's name, diffusers', the layers.
_KINDS = (
    ("double_blocks", "transformer_blocks", _DOUBLE),
    ("single_blocks", "single_transformer_blocks", _SINGLE),
)
_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "module.",
    "lora_unet_", "lora_transformer_",
)  # fmt: skip
_ENDINGS = re.compile(
    r"(?P<module>.+?)(?:"
    r"\.alpha|"
    r"\.lora_(?P<letter>[AB])(?:\.(?!weight$)[^.]+)?\.weight|"
    r"\.lora_(?P<letter_alone>[AB])|"
    r"(?:[._]lora(?:_linear_layer)?[._]|\.lora_)(?P<word>down|up)\.weight"
    r")"
)
_TENSORS = {"A": "down", "B": "up", "down": "down", "up": "up", None: "alpha"}
_PROCESSOR_KEY = re.compile(
    r"(?P<block>(?:single_)?transformer_blocks\.\d+)\.attn\.processor\."
    r"(?P<linear>q|k|v|proj)_loras\.(?P<condition>\d{1,3})\.(?P<tensor>down|up)\.weight"
)
_PROCESSOR_LINEARS = {"q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out.0"}


def parse(key: str) -> KeyName | None:
    """What a key names; None for one that belongs to no plain LoRA."""
    bare = _without_prefixes(key)
    own = _PROCESSOR_KEY.fullmatch(bare)
    if own is not None:
        module = f"{own['block']}.attn.{_PROCESSOR_LINEARS[own['linear']]}"
        return KeyName((module,), own["tensor"], PROCESSOR, int(own["condition"]))
    match = _ENDINGS.fullmatch(bare)
    if match is None:
        return None
    tensor = _TENSORS[match["letter"] or match["letter_alone"] or match["word"]]
    return KeyName(_modules(match["module"]), tensor)


def way_of(keys: Iterable[str]) -> str:
    """How most of a file's keys are written; ``PLAIN`` where none names anything."""
    named = [name.way for name in map(parse, keys) if name is not None]
    return max((PLAIN, PROCESSOR), key=named.count)


def passed(module: str) -> bool | None:
    """Whether a condition's tokens pass one of FLUX.1's layers; None where there is no such layer.

    Args:
        module: diffusers' name.
    """
    if module in _AROUND_PASSED:
        return _AROUND_PASSED[module]
    kind, _, rest = module.partition(".")
    number, _, layer = rest.partition(".")
    return _BLOCKS_PASSED.get((kind, layer)) if number.isdigit() else None


def _without_prefixes(key: str) -> str:
    while True:
        bare = key
        for prefix in _PREFIXES:
            bare = bare.removeprefix(prefix)
        if bare == key:
            return bare
        key = bare


def _modules(name: str) -> tuple[str, ...]:
    """Diffusers' names of a module that is named in any way; an unknown one's name as it is."""
    if name in _NAMES:
        return _NAMES[name]
    for pattern, kind, layers in _BLOCKS:
        match = pattern.fullmatch(name)
        found = layers.get(match["layer"]) if match else None
        if match and found:
            return tuple(f"{kind}.{int(match['number'])}.{layer}" for layer in found)
    return (name,)


def _spelt(layers: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Every spelling of layers -> diffusers' names: ComfyUI's and diffusers', with underscores."""
    own = {name: (name,) for names in layers.values() for name in names}
    both = {**layers, **own}
    return {**both, **{name.replace(".", "_"): names for name, names in both.items()}}


_NAMES = _spelt(_AROUND)
_BLOCKS = [
    (re.compile(rf"(?:{ours}|{theirs})[._](?P<number>\d{{1,4}})[._](?P<layer>.+)"), theirs, spelt)
    for ours, theirs, layers in _KINDS
    for spelt in [_spelt(layers)]
]
_AROUND_PASSED = {
    name: comfy == "img_in" for comfy, names in _AROUND.items() for name in names
}  # fmt: skip
_BLOCKS_PASSED = {
    (theirs, name): not comfy.startswith("txt_")
    for _, theirs, layers in _KINDS
    for comfy, names in layers.items()
    for name in names
}

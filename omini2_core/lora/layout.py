"""What a LoRA file holds, by its keys alone; what is no plain LoRA is refused by its own name.

Nodes and editor both ask here, so that they say the same of a file.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import NamedTuple

from ..errors import Omini2Error, brief
from .names import KeyName, parse

LISTED_KEYS = 4  # how many keys an error names before it says "and n more"
SUFFIXES = ".safetensors", ".sft"
LOAD_LORA = "load it with Load LoRA instead"
# What is no plain LoRA: a pattern that finds one of its keys, what it is, where it goes.
_OTHERS = tuple(
    (re.compile(pattern), what, way_out)
    for pattern, what, way_out in (
        (r"^dreamo_", "DreamO's, with embeddings of its own", "use the nodes made for DreamO"),
        (
            r"\.processor\.(qkv|proj)_lora\d?\.",
            "in XLabs' format",
            "load USO's with Load LoRA, any other with XLabs' own nodes",
        ),
        (
            r"^(lora_te\d?_|text_encoders?[_.]|te\d?\.|clip_l\.|t5xxl\.)",
            "an ordinary LoRA for the text encoder as well",
            LOAD_LORA,
        ),
        (
            r"(\.(scale_weight|scale_input|weight_scale|input_scale)|^scaled_fp8)$",
            "quantised to fp8 with scales of its own",
            "choose the same LoRA in bf16, fp16 or plain fp8",
        ),
        (r"\.(dora_scale|lora_magnitude_vector)\b", "a DoRA", LOAD_LORA),
        (r"\.lokr_", "a LoKr", LOAD_LORA),
        (r"\.hada_", "a LoHa", LOAD_LORA),
        (r"\.(oft_|boft_|lora_mid\b|a1\.weight$)", "no plain LoRA but of another type", LOAD_LORA),
        (r"\blora_?(B|up|\.up)\b.*\.bias$|\.diff(_b)?$", "a LoRA with biases", LOAD_LORA),
        (
            r"(double_blocks\.0\.img_attn\.qkv|transformer_blocks\.0\.attn\.to_q)\.weight$",
            "a whole model, not a LoRA",
            "load it with Load Diffusion Model",
        ),
    )
)


class Part(NamedTuple):
    """Where in a file a module's tensor is.

    Attributes:
        key: the tensor.
        modules: the modules whose outputs B's rows are, in their order, this one among them.
    """

    key: str
    modules: tuple[str, ...]


# Module -> "down", "up" and perhaps "alpha" -> where.
Layout = dict[str, dict[str, Part]]


def require_suffix(name: str) -> None:
    """Refuses files that can run code when they are opened, with the way to convert them.

    Raises:
        Omini2Error: the name is no safetensors file's.
    """
    path = PurePath(name)
    if path.suffix.lower() not in SUFFIXES:
        raise Omini2Error(
            f"lora_name: {path.name} is not a .safetensors file; other formats can run code when "
            "they are opened, so convert it in Python with "
            f'd = torch.load("{path.name}", weights_only=True); d = d.get("state_dict", d); '
            "safetensors.torch.save_file({k: v.contiguous().clone() for k, v in d.items() if "
            f'torch.is_tensor(v)}}, "{path.stem}.safetensors") and choose the result.'
        )


def layout_of(
    name: str, keys: Iterable[str], way: str, passes: Callable[[str], bool | None]
) -> Layout:
    """Which tensors a file has for which modules.

    Args:
        name: the file's.
        way: how the file's keys are written, as :func:`..names.way_of` says.
        passes: whether conditions pass a module; None where the model has none of this name.

    Raises:
        Omini2Error: no LoRA, a LoRA for other modules or of another type, for several conditions
            or half a one. Every key has to be used: none is skipped.
    """
    keys = list(keys)
    _refuse_others(name, keys)
    named = {key: parse(key) for key in keys}
    _refuse_strangers(name, named, way, passes)
    conditions = {each.condition for each in named.values() if each is not None}
    if len(conditions) > 1:
        raise Omini2Error(
            f"lora_name: {name} holds LoRAs for several conditions, but a condition takes one; "
            "choose EasyControl's single-condition files, each in an Apply Omini2 LoRA node of its "
            "own."
        )
    found: Layout = {}
    for key, each in named.items():
        assert each is not None
        for module in each.modules:
            part = found.setdefault(module, {}).setdefault(each.tensor, Part(key, each.modules))
            if part.key != key:
                raise Omini2Error(
                    f"lora_name: {name} holds {module} twice, under {part.key} and {key}; download "
                    "it again, or save one LoRA a file."
                )
    for module, parts in found.items():
        if "down" not in parts or "up" not in parts:
            raise Omini2Error(
                f"lora_name: {name} has only half of the LoRA for {module}; download it again."
            )
    return found


def _refuse_others(name: str, keys: Iterable[str]) -> None:
    keys = list(keys)
    for pattern, what, way_out in _OTHERS:
        key = next(filter(pattern.search, keys), None)
        if key is not None:
            raise Omini2Error(
                f"lora_name: {name} is {what} ({brief(key)}), and conditions take plain LoRAs; "
                f"{way_out}."
            )


def _refuse_strangers(
    name: str,
    named: Mapping[str, KeyName | None],
    way: str,
    passes: Callable[[str], bool | None],
) -> None:
    """Keys that belong to nothing that a condition passes."""
    unknown, ordinary = [], False
    for key, each in named.items():
        where = [] if each is None or each.way != way else list(map(passes, each.modules))
        if not where or not all(where):
            unknown.append(key)
            ordinary |= False in where
    if not unknown:
        return
    listed = ", ".join(map(brief, sorted(unknown)[:LISTED_KEYS]))
    if len(unknown) > LISTED_KEYS:
        listed += f" and {len(unknown) - LISTED_KEYS} more"
    if ordinary:
        raise Omini2Error(
            f"lora_name: {name} is an ordinary LoRA, not a condition LoRA: it changes parts of the "
            f"model that no condition passes through ({listed}); {LOAD_LORA}."
        )
    raise Omini2Error(
        f"lora_name: {name} is no condition LoRA for FLUX.1: nothing in the model belongs to "
        f"{listed}; choose a LoRA made for OminiControl or EasyControl, or one that follows them "
        "(ordinary LoRAs go through Load LoRA)."
    )

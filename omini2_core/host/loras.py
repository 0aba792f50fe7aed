"""The condition LoRA that a person chose, for a MODEL."""

from pathlib import Path

from comfy.model_patcher import ModelPatcher

from ..errors import Omini2Error, brief
from ..lora import presets
from ..lora.family import NO_LORA
from ..lora.file import BranchLora, load_lora, no_lora, passes_of
from ..lora.recognise import Recognised, recognise, without_lora
from .folders import lora_path, read_header
from .model import lora_targets


def chosen_lora(
    model: ModelPatcher, lora_name: str, family: str
) -> tuple[Recognised | None, BranchLora]:
    """What a file is taken for, and the LoRA itself.

    Args:
        lora_name: a file's, or ``NO_LORA``.
        family: one of ``FAMILY_CHOICES``.

    Raises:
        Omini2Error: there is no such file, it holds no condition LoRA for this model, or it can't
            be of the family.
    """
    targets, foreign = lora_targets(model)
    if lora_name == NO_LORA:
        chosen = without_lora(family)
        return Recognised(chosen, presets.find(lora_name, chosen)), no_lora(chosen)
    path = _path(lora_name)
    keys, metadata = read_header(path)
    if not keys:  # loading says what is wrong with it
        return None, load_lora(path, targets, foreign)
    found = recognise(lora_name, keys, metadata, family, passes_of(targets, foreign))
    return found, load_lora(path, targets, foreign, found.family)


def require_choosable(lora_name: str, family: str, attention: str) -> None:
    """Refuses what no FLUX.1 could take; fast, by the file's header alone.

    Raises:
        Omini2Error: as :func:`chosen_lora`.
    """
    if lora_name == NO_LORA:
        without_lora(family).require_attention(attention)
        return
    keys, metadata = read_header(_path(lora_name))
    if keys:  # loading says what is wrong with it
        recognise(lora_name, keys, metadata, family).family.require_attention(attention)


def _path(lora_name: str) -> Path:
    path = lora_path(lora_name)
    if path is None:
        raise Omini2Error(
            f"lora_name: there is no {brief(lora_name)} in ComfyUI's loras folder; put the file "
            "there and press R to refresh the list."
        )
    return path

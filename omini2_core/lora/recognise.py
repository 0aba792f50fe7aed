"""Which family a LoRA file is of, and how it is used: by what it says of itself, name and keys.

Where that leaves more than one, the person is told which it was taken for and how to change that.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import Omini2Error, Remedy, brief, require_choice, warn
from ..tokens.condition import Condition
from . import presets
from .family import AUTO, BY_NAME, FAMILIES, FAMILY_CHOICES, NO_LORA, LoraFamily, fitting
from .layout import LOAD_LORA, layout_of, require_suffix
from .names import PLAIN, parse, passed, way_of
from .usage import Usage

FAMILY_KEY = f"{presets.PREFIX}family"
IMAGE_IN = "x_embedder"  # which condition LoRAs act on, and ordinary ones hardly ever
ATTENTION_LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")


class Doubt(NamedTuple):
    """What isn't certain of a file."""

    sentence: str
    remedies: tuple[Remedy, ...] = ()


@dataclass(frozen=True)
class Recognised:
    """What a file was taken for.

    Attributes:
        usage: how it is used, as far as anything says it.
    """

    family: LoraFamily
    usage: Usage | None
    doubts: tuple[Doubt, ...] = ()

    def warn_about(self, condition: Condition, attention: str) -> None:
        """Says what isn't certain, and what of a user's settings isn't what the LoRA is for."""
        for doubt in self.doubts:
            warn(doubt.sentence, *doubt.remedies)
        if self.usage is not None:
            self.usage.warn_about(condition, attention)


def without_lora(chosen: str) -> LoraFamily:
    """The family of a condition for which no LoRA is chosen.

    Raises:
        Omini2Error: conditions of the chosen family need one.
    """
    require_choice("family", chosen, FAMILY_CHOICES)
    if chosen != AUTO and BY_NAME[chosen].way is None:
        return BY_NAME[chosen]
    names = " or ".join(family.name for family in FAMILIES if family.way is None)
    raise Omini2Error(
        f"lora_name: {NO_LORA} is for {names}, whose conditions have no LoRA of their own; choose "
        f"the condition's LoRA, or set family to {names}."
    )


def recognise(
    lora_name: str,
    keys: Iterable[str],
    metadata: Mapping[str, str],
    chosen: str = AUTO,
    passes: Callable[[str], bool | None] = passed,
) -> Recognised:
    """What a file is.

    Args:
        chosen: one of ``FAMILY_CHOICES``; what the person says goes.
        passes: whether conditions pass a module; without a model, FLUX.1's in general.

    Raises:
        Omini2Error: the file holds no condition LoRA, or can't be of the chosen family.
    """
    require_choice("family", chosen, FAMILY_CHOICES)
    keys = list(keys)
    families = fitting(keys)
    said = _said(metadata, families) if chosen == AUTO else BY_NAME[chosen]
    # Whose a file is says more of the way out than its keys do.
    if said is None:
        _refuse_ordinary(lora_name)
    elif said.way is None:
        raise Omini2Error(
            f"lora_name: {said.name}'s conditions have no LoRA of their own; set lora_name to "
            f"{NO_LORA} and load {brief(lora_name)} with Load LoRA."
        )
    layout_of(lora_name, keys, way_of(keys), passes)
    if said is not None:
        _require_fit(lora_name, said, families)
        own = presets.of_file(lora_name, said, metadata)
        return Recognised(said, own or presets.find(lora_name, said))
    published = [usage for usage in presets.named(lora_name) if BY_NAME[usage.family] in families]
    if published:
        family = BY_NAME[published[0].family]
        others = [usage.family for usage in published[1:]]
        return Recognised(family, published[0], _doubt(lora_name, family, others))
    doubts = _doubt(lora_name, families[0], [family.name for family in families[1:]])
    return Recognised(families[0], None, doubts + _attention_only(lora_name, keys))


def _said(metadata: Mapping[str, str], families: list[LoraFamily]) -> LoraFamily | None:
    """What a file of this project's trainer says; older ones are all OminiControl's."""
    by_name = {family.name: family for family in families}
    if FAMILY_KEY in metadata:
        return by_name.get(metadata[FAMILY_KEY])
    ours = any(key.startswith(presets.PREFIX) for key in metadata)
    return families[0] if ours else None


def _require_fit(lora_name: str, family: LoraFamily, families: list[LoraFamily]) -> None:
    if family in families:
        return
    names = " or ".join(each.name for each in families)
    raise Omini2Error(
        f"family: {brief(lora_name)} doesn't have the keys of {family.name}'s LoRAs; set family to "
        f"auto, or to {names}."
    )


def _refuse_ordinary(lora_name: str) -> None:
    usage = presets.ordinary(lora_name)
    if usage is not None:
        none = f", and set lora_name to {NO_LORA} here" if usage.file == NO_LORA else ""
        raise Omini2Error(
            f"lora_name: {brief(lora_name)} is {usage.family}'s LoRA for the picture, not for a "
            f"condition; {LOAD_LORA}{none} (or set family, if it is something else)."
        )


def _doubt(lora_name: str, family: LoraFamily, others: list[str]) -> tuple[Doubt, ...]:
    if not others:
        return ()
    names = [family.name, *others]
    sentence = (
        f"family: {brief(lora_name)} may be {_listed(names)}'s by its name and "
        f"keys, and runs as {family.name}'s; if it is another's, set family."
    )
    return (Doubt(sentence, tuple(Remedy({"family": name}) for name in names)),)


def _attention_only(lora_name: str, keys: list[str]) -> tuple[Doubt, ...]:
    """Condition LoRAs act on modulation and MLP too, ordinary ones often on attention alone."""
    if way_of(keys) != PLAIN:
        return ()
    modules = {module for name in map(parse, keys) if name is not None for module in name.modules}
    if not all(module.endswith(ATTENTION_LAYERS) for module in modules):
        return ()
    sentence = (
        f"lora_name: {brief(lora_name)} acts on attention only, as ordinary LoRAs do; if it is "
        f"one, {LOAD_LORA}."
    )
    return (Doubt(sentence),)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}"


def answer(
    lora_name: str,
    keys: Iterable[str],
    metadata: Mapping[str, str],
    base: str | None = None,
    chosen: str = AUTO,
    compression: float = 1.0,
) -> dict[str, Any]:
    """What the editor is told of a file; :mod:`..host.routes` says what each entry is for."""
    try:
        found = _found(lora_name, list(keys), metadata, chosen)
    except Omini2Error as error:
        return _unknown(str(error).partition(": ")[2])
    doubts = " ".join(doubt.sentence.partition(": ")[2] for doubt in found.doubts)
    usage = found.usage
    if usage is None or not usage.complete:
        alone = usage is not None and usage.attention == "independent"
        usage = presets.find(lora_name, found.family)
        if usage is None:
            return _unknown(f"{_unpublished(lora_name, found.family, alone)} {doubts}".strip())
    values = usage.values(base, compression)
    if found.doubts:
        values["family"] = AUTO
    return {
        "known": True,
        "title": usage.title,
        "values": values,
        "bases": list(usage.sampling),
        "note": f"{usage.note} {doubts}".strip(),
    }


def misplaced(lora_name: str, keys: Iterable[str], metadata: Mapping[str, str]) -> str:
    """A sentence where a file is a condition LoRA for certain and so not for Load LoRA; else "".

    Ordinary LoRAs can have any name and most of the keys, so both have to agree, or the file says
    it of itself.
    """
    keys = list(keys)
    try:
        found = recognise(lora_name, keys, metadata)
    except Omini2Error:
        return ""  # ordinary, or nothing that anybody could load
    said = any(key.startswith(presets.PREFIX) for key in metadata)
    families = [found.family]
    if way_of(keys) == PLAIN and not said:
        named = (BY_NAME[usage.family] for usage in presets.named(lora_name))
        families = [family for family in named if family in fitting(keys)]
    if not families or any(family.on_picture for family in families):
        return ""
    modules = {module for name in map(parse, keys) if name is not None for module in name.modules}
    if way_of(keys) == PLAIN and not said and IMAGE_IN not in modules:
        return ""
    return (
        f"lora_name: {brief(lora_name)} is a LoRA for conditions ({_listed_families(families)}), "
        "and Load LoRA would put it on the whole model or nowhere; choose it in Apply Omini2 LoRA, "
        "and take this node out."
    )


def _listed_families(families: list[LoraFamily]) -> str:
    names = list(dict.fromkeys(family.name for family in families))
    return names[0] if len(names) == 1 else _listed(names)


def _found(lora_name: str, keys: list[str], metadata: Mapping[str, str], chosen: str) -> Recognised:
    if lora_name == NO_LORA:
        family = next(each for each in FAMILIES if each.way is None)
        return Recognised(family, presets.find(lora_name, family))
    require_suffix(lora_name)
    if not keys:
        raise Omini2Error(
            f"lora_name: {lora_name} can't be read as a safetensors file; download it again."
        )
    return recognise(lora_name, keys, metadata, chosen)


def _unpublished(lora_name: str, family: LoraFamily, alone: bool) -> str:
    attention = "independent" if alone else family.attention[0]
    return (
        f"{lora_name} is none of the published condition LoRAs and doesn't say how it was "
        f"trained. It runs as {family.name}'s do: {attention}, with the placement and image "
        "size that you set; ask its author for both."
    )


def _unknown(note: str) -> dict[str, Any]:
    return {"known": False, "title": "", "values": {}, "bases": [], "note": note}

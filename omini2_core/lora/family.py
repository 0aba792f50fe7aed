"""Families of published condition LoRAs: what differs between them, one description each.

The branch and the cache know nothing of families. A file's keys say which one it belongs to.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import Omini2Error, require_choice
from ..tokens.condition import PLACEMENTS, Placement


class KeyName(NamedTuple):
    """What a key of a LoRA file names.

    Attributes:
        module: diffusers' name of the linear layer.
        tensor: "down" (A), "up" (B) or "alpha".
        condition: which condition of the file it belongs to, from 0.
    """

    module: str
    tensor: str
    condition: int = 0


@dataclass(frozen=True)
class LoraFamily:
    """How LoRAs of one family were trained, as far as running them depends on it.

    Attributes:
        name: what users call it.
        parse: a file's key -> what it names, or None for a key of another family.
        attention: the modes that its conditions may run in, "joint" and "independent".
        branch_guidance: the guidance that conditions get; None is the conditioning's own.
        centred: whether a token that stands for s x s of the picture's lies at their centre,
            s*i + (s-1)/2, or at their corner, s*i.
        reads_output: ends of the modules' names whose LoRA reads the layer's output, not its input.
        subject_delta: rows and columns by which subjects are moved, where there is one rule.
    """

    name: str
    parse: Callable[[str], KeyName | None]
    attention: tuple[str, ...]
    branch_guidance: float | None
    centred: bool
    reads_output: tuple[str, ...] = ()
    subject_delta: tuple[float, float] | None = None

    def require_attention(self, attention: str) -> None:
        """Checks what a user chose; "auto" is always right.

        Raises:
            Omini2Error: conditions of this family were never trained so.
        """
        if attention != "auto" and attention not in self.attention:
            raise Omini2Error(
                f"attention: {self.name}'s LoRAs were trained with conditions that see only "
                f"themselves, so {attention} would feed them what they have never seen; set "
                "attention to auto or independent."
            )


def _ominicontrol_key(key: str) -> KeyName | None:
    module = key.removeprefix("transformer.")
    for ending, tensor in (
        (".lora_A.weight", "down"),
        (".lora_B.weight", "up"),
        (".alpha", "alpha"),
    ):
        if module.endswith(ending):
            return KeyName(module.removesuffix(ending), tensor)
    return None


_EASYCONTROL_KEY = re.compile(
    r"(?P<block>(?:single_)?transformer_blocks\.\d+)\.attn\.processor\."
    r"(?P<linear>q|k|v|proj)_loras\.(?P<condition>\d{1,3})\.(?P<tensor>down|up)\.weight"
)
_EASYCONTROL_LINEARS = {"q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out.0"}


def _easycontrol_key(key: str) -> KeyName | None:
    match = _EASYCONTROL_KEY.fullmatch(key)
    if match is None:
        return None
    module = f"{match['block']}.attn.{_EASYCONTROL_LINEARS[match['linear']]}"
    return KeyName(module, match["tensor"], int(match["condition"]))


# Original `flux_omini.py` and `Condition.encode`.
OMINICONTROL = LoraFamily(
    name="OminiControl",
    parse=_ominicontrol_key,
    attention=("joint", "independent"),
    branch_guidance=1.0,
    centred=True,
)
# arXiv 2503.07027. Original `layers_cache.py` (LoRA, attention), `FluxTransformer2DModel.forward`
# (guidance), `resize_position_encoding` and `FluxPipeline.prepare_latents` (positions). Its files
# carry no alpha: the loader sets alpha to the rank, which makes the scale 1.
EASYCONTROL = LoraFamily(
    name="EasyControl",
    parse=_easycontrol_key,
    attention=("independent",),
    branch_guidance=None,
    centred=False,
    reads_output=("attn.to_out.0",),
    subject_delta=(64.0, 0.0),
)
FAMILIES = (OMINICONTROL, EASYCONTROL)
_SUBJECTS = {
    f"{family.name.lower()}_subject": family.subject_delta
    for family in FAMILIES
    if family.subject_delta is not None
}
PLACEMENT_CHOICES = (*PLACEMENTS, *_SUBJECTS)


def family_of(keys: Iterable[str]) -> LoraFamily:
    """The family that most of a file's keys belong to; the first one where none belongs to any."""
    keys = list(keys)
    return max(FAMILIES, key=lambda family: sum(family.parse(key) is not None for key in keys))


def chosen_placement(
    choice: str, delta: tuple[float, float], scale: tuple[float, float]
) -> Placement:
    """One of ``PLACEMENT_CHOICES`` as a placement: a family's subject offset is a custom delta."""
    require_choice("placement", choice, PLACEMENT_CHOICES)
    if choice in _SUBJECTS:
        return Placement("custom", _SUBJECTS[choice], scale)
    return Placement(choice, delta, scale)

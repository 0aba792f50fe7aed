"""Families of published condition LoRAs: what differs between them, a row of switches each.

Branch, cache and attention know nothing of families, only of the switches. Which family a file is
of, its keys alone don't say: :mod:`.recognise` goes by its name and by what it says of itself too.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import Omini2Error, require_choice
from ..tokens.condition import PLACEMENTS, Placement
from .names import PLAIN, PROCESSOR, way_of

AUTO = "auto"
NO_LORA = "(none)"  # in place of a file's name, where a condition has no LoRA of its own


@dataclass(frozen=True)
class LoraFamily:
    """How LoRAs of one family were trained, as far as running them depends on it.

    Attributes:
        name: what users call it.
        way: how its files' keys are written; None where conditions have no LoRA of their own.
        attention: the modes that its conditions may run in, "joint" and "independent".
        branch_guidance: the guidance that conditions get; None is the conditioning's own.
        at_step: whether conditions are at the step's time, like the picture, not at time 0.
        on_picture: whether a condition's LoRA acts on the picture as well.
        keeps_ordinary: whether ordinary LoRAs, which act on the model's weights, act on conditions
            too.
        one_sequence: whether conditions see each other.
        centred: whether a token that stands for s x s of the picture's lies at their centre,
            s*i + (s-1)/2, or at their corner, s*i.
        reads_output: ends of the modules' names whose LoRA reads the layer's output, not its input.
        unused: ends of the modules' names whose LoRA is in the files, but never used.
        subject_delta: rows and columns by which subjects are moved, where there is one rule.
    """

    name: str
    way: str | None = PLAIN
    attention: tuple[str, ...] = ("joint", "independent")
    branch_guidance: float | None = 1.0
    at_step: bool = False
    on_picture: bool = False
    keeps_ordinary: bool = False
    one_sequence: bool = False
    centred: bool = True
    reads_output: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    subject_delta: tuple[float, float] | None = None

    def require_attention(self, attention: str) -> None:
        """Checks what a user chose; "auto" is always right.

        Raises:
            Omini2Error: conditions of this family were never trained so.
        """
        if attention != "auto" and attention not in self.attention:
            (trained,) = self.attention
            see = "see only themselves" if trained == "independent" else "look at the picture too"
            raise Omini2Error(
                f"attention: {self.name}'s LoRAs were trained with conditions that {see}, so "
                f"{attention} would feed them what they have never seen; set attention to auto or "
                f"{trained}."
            )


OMINICONTROL = LoraFamily("OminiControl")  # original `flux_omini.py` and `Condition.encode`
# arXiv 2503.07027. Original `layers_cache.py` (LoRA, attention), `FluxTransformer2DModel.forward`
# (guidance), `resize_position_encoding` and `FluxPipeline.prepare_latents` (positions). Its files
# carry no alpha: the loader sets alpha to the rank, which makes the scale 1.
EASYCONTROL = LoraFamily(
    "EasyControl",
    way=PROCESSOR,
    attention=("independent",),
    branch_guidance=None,
    keeps_ordinary=True,
    centred=False,
    reads_output=("attn.to_out.0",),
    subject_delta=(64.0, 0.0),
)
PICTURE_FAMILY = LoraFamily("IEAP", on_picture=True)  # OminiControl's code with ``latent_lora``
FAMILIES = (
    OMINICONTROL,
    EASYCONTROL,
    LoraFamily(
        "OmniConsistency",
        way=PROCESSOR,
        attention=("independent",),
        branch_guidance=None,
        keeps_ordinary=True,
        centred=False,
        unused=("attn.to_out.0",),
    ),
    PICTURE_FAMILY,
    LoraFamily("UniCombine", branch_guidance=None),
    LoraFamily("OmniPaint", attention=("joint",), branch_guidance=None, one_sequence=True),
    LoraFamily(
        "PhotoDoodle",
        way=None,
        attention=("joint",),
        branch_guidance=None,
        at_step=True,
        keeps_ordinary=True,
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}
FAMILY_CHOICES = (AUTO, *BY_NAME)
_SUBJECTS = {
    f"{family.name.lower()}_subject": family.subject_delta
    for family in FAMILIES
    if family.subject_delta is not None
}
PLACEMENT_CHOICES = (*PLACEMENTS, *_SUBJECTS)


def fitting(keys: Iterable[str]) -> list[LoraFamily]:
    """The families that a file can be of by its keys; the first one where nothing else tells."""
    way = way_of(keys)
    return [family for family in FAMILIES if family.way == way]


def family_of(keys: Iterable[str]) -> LoraFamily:
    """The first family that a file can be of by its keys."""
    return fitting(keys)[0]


def chosen_placement(
    choice: str, delta: tuple[float, float], scale: tuple[float, float]
) -> Placement:
    """One of ``PLACEMENT_CHOICES`` as a placement: a family's subject offset is a custom delta."""
    require_choice("placement", choice, PLACEMENT_CHOICES)
    if choice in _SUBJECTS:
        return Placement("custom", _SUBJECTS[choice], scale)
    return Placement(choice, delta, scale)

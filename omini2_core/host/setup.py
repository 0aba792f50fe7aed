"""What the nodes add to a MODEL: immutable, carried by the model, shared by its clones."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..cache.file import Saved
from ..cache.policy import CachePolicy
from ..engine.spot import SpotEdit
from ..errors import Omini2Error, require_choice, require_range
from ..lora.file import BranchLora
from ..lora.usage import Usage
from ..tokens.condition import TOKEN_PIXELS, Condition

KEY = "omini2"  # of everything that is ours in a model's options
ATTENTION = ("auto", "joint", "independent")
# A sampler's inputs behind which the picture's size is set, and behind which our nodes are.
LATENT, MODEL = ("latent_image",), ("model", "guider")


@dataclass(frozen=True, eq=False)
class Branch:
    """One condition with its LoRA, as an *Apply Omini2 LoRA* node describes it.

    Attributes:
        node: the node's id in the editor, to show figures on it; nothing depends on it.
        usage: how the LoRA is used, as far as anything says it; only warnings depend on it.
    """

    condition: Condition
    lora: BranchLora
    strength: float = 1.0
    condition_scale: float = 1.0
    attention: str = "auto"
    start_percent: float = 0.0
    end_percent: float = 1.0
    node: str | None = None
    usage: Usage | None = None

    def __post_init__(self) -> None:
        require_choice("attention", self.attention, ATTENTION)
        self.lora.family.require_attention(self.attention)
        require_range("strength", self.strength, -1000, 1000)
        require_share(self.condition_scale, self.start_percent, self.end_percent)

    @property
    def joint(self) -> bool:
        """Whether it attends to text and picture; ``auto`` believes the LoRA file, else joint."""
        if self.attention == "auto":
            return not self.lora.independent
        return self.attention == "joint"


def require_share(condition_scale: float, start_percent: float, end_percent: float) -> None:
    """Refuses a condition that could never take part."""
    require_range("condition_scale", condition_scale, 0, 1000)
    require_range("start_percent", start_percent, 0, 1)
    require_range("end_percent", end_percent, 0, 1)
    if start_percent >= end_percent:
        raise Omini2Error(
            f"start_percent: {start_percent} is not below end_percent ({end_percent}), so the "
            "condition would never take part; lower start_percent."
        )


@dataclass(frozen=True, eq=False)
class SavedBranch:
    """A condition whose K/V come from a file, as an *Omini2 Load Cache* node describes it."""

    saved: Saved
    condition_scale: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    node: str | None = None

    def __post_init__(self) -> None:
        require_share(self.condition_scale, self.start_percent, self.end_percent)


@dataclass(frozen=True, eq=False, repr=False)
class Spot:
    """What an *Omini2 Spot Edit* node says.

    Attributes:
        vae: the host's; its decoder tells unedited tokens from others.
        mask: (m, H, W), what is always computed.
        token_pixels: of the picture, along a token's side.
        node: as ``Branch.node``.
    """

    edit: SpotEdit
    vae: Any = None
    mask: Tensor | None = None
    token_pixels: int = TOKEN_PIXELS
    node: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Setup:
    """Everything the extension's nodes say about one MODEL.

    Attributes:
        policy_node: the *Condition Cache* node's id, as ``Branch.node``.
        references: what is done with an editing model's references: joint, isolated or off.
        spot: what of an edit is left out, if anything.
    """

    branches: tuple[Branch, ...] = ()
    saved: tuple[SavedBranch, ...] = ()
    policy: CachePolicy | None = None
    policy_node: str | None = None
    image_guidance_scale: float = 1.0
    references: str = "off"
    spot: Spot | None = None

    def __post_init__(self) -> None:
        require_range("image_guidance_scale", self.image_guidance_scale, 0, 1000)

    @property
    def integration(self) -> Branch | None:
        """The branch that is a token integration, if any."""
        return next((b for b in self.branches if b.condition.paint is not None), None)

    @property
    def active_branches(self) -> list[Branch]:
        """Those that are run: not where condition_scale shuts one out, or nothing of it is left."""
        return [b for b in self.branches if b.condition_scale > 0 and b.condition.token_count]

    @property
    def active_saved(self) -> list[SavedBranch]:
        """Those of the files that take part."""
        return [b for b in self.saved if b.condition_scale > 0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Setup":
        # The host deep-copies a model's options at every clone; nothing in here ever changes.
        return self

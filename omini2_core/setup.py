"""What the nodes add to a MODEL: immutable, carried by the model, shared by its clones."""

from dataclasses import dataclass
from typing import Any

from .cache import CachePolicy
from .condition import Condition
from .errors import Omini2Error, require_choice, require_range
from .lora import BranchLora

ATTENTION = ("auto", "joint", "independent")


@dataclass(frozen=True, eq=False)
class Branch:
    """One condition with its LoRA, as an *Apply Omini2 LoRA* node describes it."""

    condition: Condition
    lora: BranchLora
    strength: float = 1.0
    condition_scale: float = 1.0
    attention: str = "auto"
    start_percent: float = 0.0
    end_percent: float = 1.0

    def __post_init__(self) -> None:
        require_choice("attention", self.attention, ATTENTION)
        self.lora.family.require_attention(self.attention)
        require_range("strength", self.strength, -1000, 1000)
        require_range("condition_scale", self.condition_scale, 0, 1000)
        require_range("start_percent", self.start_percent, 0, 1)
        require_range("end_percent", self.end_percent, 0, 1)
        if self.start_percent >= self.end_percent:
            raise Omini2Error(
                f"start_percent: {self.start_percent} is not below end_percent "
                f"({self.end_percent}), so the condition would never take part; lower "
                "start_percent."
            )

    @property
    def joint(self) -> bool:
        """Whether it attends to text and picture; ``auto`` believes the LoRA file, else joint."""
        if self.attention == "auto":
            return not self.lora.independent
        return self.attention == "joint"


@dataclass(frozen=True, eq=False, repr=False)
class Setup:
    """Everything the extension's nodes say about one MODEL."""

    branches: tuple[Branch, ...] = ()
    policy: CachePolicy | None = None
    image_guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        require_range("image_guidance_scale", self.image_guidance_scale, 0, 1000)

    @property
    def integration(self) -> Branch | None:
        """The branch that is a token integration, if any."""
        return next((b for b in self.branches if b.condition.paint is not None), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Setup":
        # The host deep-copies a model's options at every clone; nothing in here ever changes.
        return self

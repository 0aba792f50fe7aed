"""What a user conditions on: an image, its tokens and where they lie beside the picture.

A *token* is one 2x2 latent patch, 16x16 pixels. Rows and columns are counted in tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import require_choice, require_kind, require_range
from .fit import Fit

TOKEN_PIXELS = 16
LATENT_CHANNELS = 16
MIN_SCALE, MAX_SCALE = 1e-3, 1e4
MAX_DELTA = 1e6
PLACEMENTS = ("aligned", "fit", "left", "right", "above", "below", "custom")


@dataclass(frozen=True)
class Placement:
    """Where a condition's tokens lie relative to the picture's, before either size is known.

    ``delta`` (rows, columns) counts only for ``custom``. ``fit`` takes its scale from the sizes,
    times ``scale`` (rows, columns), which is 1 unless positions are left uncorrected. Follows
    ``position_delta`` and ``position_scale`` of the original ``Condition.encode``.
    """

    kind: str = "aligned"
    delta: tuple[float, float] = (0.0, 0.0)
    scale: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        require_choice("placement", self.kind, PLACEMENTS)
        for scale in self.scale:
            require_range("position_scale", scale, MIN_SCALE, MAX_SCALE)
        for name, delta in zip(("delta_rows", "delta_cols"), self.delta, strict=True):
            require_range(name, delta, -MAX_DELTA, MAX_DELTA)

    @property
    def on_the_picture(self) -> bool:
        """Whether it lies on the picture, wherever that is."""
        return self.kind in ("aligned", "fit")

    def delta_for(self, hw: tuple[int, int]) -> tuple[float, float]:
        """The shift in tokens (rows, columns) for a condition of ``hw`` tokens."""
        h, w = hw
        return {
            "left": (0.0, -float(w)),
            "right": (0.0, float(w)),
            "above": (-float(h), 0.0),
            "below": (float(h), 0.0),
            "custom": self.delta,
        }.get(self.kind, (0.0, 0.0))

    def scale_for(self, hw: tuple[int, int], picture_hw: tuple[int, int]) -> tuple[float, float]:
        """Picture tokens per condition token (rows, columns)."""
        if self.kind == "fit":
            return picture_hw[0] / hw[0] * self.scale[0], picture_hw[1] / hw[1] * self.scale[1]
        return self.scale


@dataclass(frozen=True, eq=False, repr=False)
class Condition:
    """A condition image in pixels and as latents, with its placement and the tokens kept.

    Attributes:
        pixels: (n, 16*h, 16*w, 3), values 0 to 1; n images steer n pictures of a batch.
        latent: (n, 16, 2*h, 2*w) as the VAE gives it.
        empty: (1, 16, 2*h, 2*w), the latent of a black image of this size, for image guidance.
        encode: the VAE's encode, (n, H, W, 3) pixels -> (n, 16, H/8, W/8) latents.
        image_size: height and width of the image given, before cropping; masks go with it.
        placement: see :class:`Placement`.
        keep: (h, w) bool, the tokens that take part; None keeps all.
        paint: (h, w) bool with token integration: the picture's tokens that are not known.
        shift_schedule: with token integration, whether the noise schedule follows their number.
        fit: how the image given has become a square; None where it was taken as it was.
    """

    pixels: Tensor
    latent: Tensor
    empty: Tensor
    encode: Callable[[Tensor], Tensor]
    image_size: tuple[int, int]
    placement: Placement = Placement()
    keep: Tensor | None = None
    paint: Tensor | None = None
    shift_schedule: bool = False
    fit: Fit | None = None

    @property
    def hw(self) -> tuple[int, int]:
        """Size in tokens (rows, columns), dropped tokens included."""
        return self.latent.shape[-2] // 2, self.latent.shape[-1] // 2

    @property
    def token_count(self) -> int:
        """The number of tokens that take part."""
        h, w = self.hw
        return h * w if self.keep is None else int(self.keep.sum())

    def coverage(self) -> tuple[float, float] | None:
        """Rows and columns of the picture that an aligned condition covers; None for others."""
        if self.placement.kind != "aligned":
            return None
        (h, w), (rows, columns) = self.hw, self.placement.scale
        return h * rows, w * columns

    def select(self, tokens: Tensor) -> Tensor:
        """(..., h*w, d) -> (..., token_count, d): the tokens that take part, row by row."""
        return (
            tokens if self.keep is None else tokens[..., self.keep.flatten().to(tokens.device), :]
        )

    def positions(self, picture_hw: tuple[int, int], centred: bool = True) -> Tensor:
        """Row and column of each token that takes part, in picture tokens.

        Args:
            picture_hw: the picture's size in tokens.
            centred: whether a token that stands for s x s of the picture's lies at their centre,
                s*i + (s-1)/2 (paper section 3.2, original ``Condition.encode``), or at s*i.

        Returns:
            (token_count, 2) float32.
        """
        return self.select(token_positions(self.hw, self.placement, picture_hw, centred))


def require_condition(condition: object) -> None:
    """Refuses anything else than what Omini2 Condition Encode gives."""
    right = isinstance(condition, Condition)
    require_kind("condition", condition, right, "condition", "Omini2 Condition Encode")


def token_positions(
    hw: tuple[int, int], placement: Placement, picture_hw: tuple[int, int], centred: bool = True
) -> Tensor:
    """Row and column of each token of an ``hw`` condition, (h*w, 2) float32, in picture tokens.

    Arguments as in :meth:`Condition.positions`.
    """
    axes = []
    for size, delta, scale in zip(
        hw, placement.delta_for(hw), placement.scale_for(hw, picture_hw), strict=True
    ):
        centre = (scale - 1) / 2 if centred else 0.0
        axes.append((torch.arange(size, dtype=torch.float32) + delta) * scale + centre)
    return torch.cartesian_prod(*axes).reshape(-1, 2)


def pack(latent: Tensor) -> Tensor:
    """(b, c, 2h, 2w) latent -> (b, h*w, 4c) tokens, packed ``b (h w) (c 2 2)`` as FLUX does."""
    b, c, height, width = latent.shape
    patches = latent.view(b, c, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)


def unpack(tokens: Tensor, hw: tuple[int, int]) -> Tensor:
    """(b, h*w, 4c) tokens -> (b, c, 2h, 2w) latent: takes :func:`pack` back."""
    patches = tokens.view(tokens.shape[0], *hw, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

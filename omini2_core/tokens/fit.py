"""How an image has become a square, so that masks of it can follow."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Fit:
    """The steps from an image to its square.

    Attributes:
        given: height and width of the image, in pixels as all sizes here.
        used: of its middle, which is cut out first.
        content: what that is scaled to.
        size: side of the square, in whose middle the content lies.
    """

    given: tuple[int, int]
    used: tuple[int, int]
    content: tuple[int, int]
    size: int

    @property
    def around(self) -> tuple[int, int, int, int]:
        """What is added left, right, above and below; an odd pixel goes right and below."""
        height, width = self.content
        left, top = (self.size - width) // 2, (self.size - height) // 2
        return left, self.size - width - left, top, self.size - height - top

    def cut(self, pixels: Tensor) -> Tensor:
        """(n, *given, c) -> (n, *used, c)."""
        height, width = self.used
        top, left = (self.given[0] - height) // 2, (self.given[1] - width) // 2
        return pixels[:, top : top + height, left : left + width]

    def of_mask(self, mask: Tensor) -> Tensor:
        """(m, 1, *given) -> (m, size, size); the strongest pixel counts, padding is outside."""
        used = self.cut(mask.movedim(1, -1)).movedim(-1, 1)[:, 0]
        return F.pad(F.adaptive_max_pool2d(used, self.content), self.around)

"""Token integration: the known region of a picture is a condition, not part of the denoising.

The picture branch holds the tokens to paint only, at their true positions (paper section 3.2,
``latent_mask`` and ``is_complement`` of the original ``generate``). What the sampler sees keeps
its full size: the model's rows are put back behind its last block, and the known tokens are
denoised to exactly what is known.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .condition import Condition
from .errors import Omini2Error

# FLUX.1-dev's schedule shift by number of picture tokens (original `calculate_shift`).
SHIFT_TOKENS = 256, 4096
SHIFT_VALUES = 0.5, 1.15


def integrate(condition: Condition, paint: Tensor, shift_schedule: bool) -> Condition:
    """Makes a condition of the part of a picture that is known.

    Args:
        paint: (h, w) bool, the tokens to paint; the others are known.
        shift_schedule: whether the noise schedule follows the number of painted tokens.

    Raises:
        Omini2Error: the condition doesn't lie on the picture token by token, or is a token
            integration already.
    """
    if condition.paint is not None:
        raise Omini2Error(
            "token_integration: this condition is one already; join the masks in one Compact "
            "Tokens node."
        )
    place = condition.placement
    on_the_picture = place.kind == "aligned" or (
        place.kind == "custom" and place.delta == (0.0, 0.0)
    )
    if not on_the_picture or place.scale != (1.0, 1.0):
        raise Omini2Error(
            "token_integration: the condition has to lie on the picture token by token; set "
            "placement to aligned and position_scale to 1 in Omini2 Condition Encode."
        )
    known = ~paint if condition.keep is None else ~paint & condition.keep
    return replace(condition, keep=known, paint=paint, shift_schedule=shift_schedule)


def schedule_shift(tokens: int) -> float:
    """FLUX.1-dev's schedule shift (mu) for this many picture tokens."""
    (t0, t1), (s0, s1) = SHIFT_TOKENS, SHIFT_VALUES
    return s0 + (s1 - s0) * (tokens - t0) / (t1 - t0)


@dataclass(eq=False)
class Integration:
    """One run's token integration.

    Attributes:
        paint: (h, w) bool.
        given: (n, 16, 2h, 2w), the picture's latent as the VAE gave it.
        known: the same in the model's space.
        text_tokens: rows of the model's text stream in this evaluation.
        picture_rows: rows of its image stream before some are taken out.
    """

    paint: Tensor
    given: Tensor
    known: Tensor
    text_tokens: int = 0
    picture_rows: int = 0
    _rows: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def check_size(self, height: int, width: int) -> None:
        """Refuses a picture, in latent pixels, of another size than the condition.

        Raises:
            Omini2Error: the sizes differ.
        """
        h, w = self.paint.shape
        if (math.ceil(height / 2), math.ceil(width / 2)) != (h, w) or height % 2 or width % 2:
            raise Omini2Error(
                f"condition: token integration needs a condition of the picture's own size, but "
                f"the condition is {16 * w}x{16 * h} and the picture {8 * width}x{8 * height}; "
                "resize the image or the latent, and paint without area conditioning."
            )

    def take(self, args: dict[str, Any]) -> dict[str, Any]:
        """The model's ``post_input`` patch: drops the known tokens and their position ids.

        Rows behind the picture's (reference latents) stay.
        """
        rows = self.rows(args["img"])
        self.text_tokens = args["txt"].shape[1]
        self.picture_rows = args["img"].shape[1]
        return {**args, "img": args["img"][:, rows], "img_ids": args["img_ids"][:, rows]}

    def put_back(self, hidden: Tensor) -> Tensor:
        """(batch, text + rows left, d) -> (batch, text + all rows, d), zero where nothing was."""
        batch, _, width = hidden.shape
        full = hidden.new_zeros(batch, self.text_tokens + self.picture_rows, width)
        full[:, : self.text_tokens] = hidden[:, : self.text_tokens]
        rows = self.rows(full[:, self.text_tokens :])
        full[:, self.text_tokens + rows] = hidden[:, self.text_tokens :]
        return full

    def rows(self, stream: Tensor) -> Tensor:
        """Indices of the rows of (batch, rows, d) that stay in the model."""
        key = stream.shape[1], stream.device
        if key not in self._rows:
            picture = self.paint.flatten().cpu()
            behind = torch.ones(stream.shape[1] - picture.numel(), dtype=torch.bool)
            rows = torch.cat((picture, behind)).nonzero()[:, 0]
            self._rows[key] = rows.to(stream.device)
        return self._rows[key]

    def select_control(
        self, control: Mapping[str, Any] | None, last_output: int
    ) -> dict[str, Any] | None:
        """A ControlNet's residuals for the tokens that are left.

        Those behind the last single block are added when all rows are back, and stay whole.

        Raises:
            Omini2Error: residuals for another number of tokens than the picture's.
        """
        if control is None:
            return None
        return {
            kind: [
                residual
                if residual is None or (kind == "output" and i == last_output)
                else self._select_residual(residual)
                for i, residual in enumerate(residuals)
            ]
            for kind, residuals in control.items()
        }

    def _select_residual(self, residual: Tensor) -> Tensor:
        if residual.shape[1] != self.paint.numel():
            raise Omini2Error(
                f"token_integration: the ControlNet gives {residual.shape[1]} rows for a picture "
                f"of {self.paint.numel()} tokens; leave it out or switch token_integration off."
            )
        return residual[:, self.rows(residual)]

    def select_mask(self, mask: Tensor | None) -> Tensor | None:
        """The host's attention mask (..., queries, keys) for the tokens that are left."""
        if mask is None:
            return None
        rows = self.rows(mask.new_empty(1, self.picture_rows, 0)) + self.text_tokens
        kept = torch.cat((torch.arange(self.text_tokens, device=mask.device), rows))
        return mask[..., kept, :][..., kept]

    def known_in(self, latent: Tensor, known: Tensor) -> Tensor:
        """``latent`` (batch, 16, 2h, 2w) with the known tokens' values taken from ``known``."""
        paint = self.paint.repeat_interleave(2, 0).repeat_interleave(2, 1).to(latent.device)
        images = torch.arange(latent.shape[0]) % known.shape[0]
        return torch.where(paint, latent, known[images].to(latent))

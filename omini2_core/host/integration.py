"""Token integration: the known region of a picture is a condition, not part of the denoising.

The picture branch holds the tokens to paint only, at their true positions (paper section 3.2,
``latent_mask`` and ``is_complement`` of the original ``generate``). What the sampler sees keeps
its full size: the model's rows are put back behind its last block, and the known tokens are
denoised to exactly what is known.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..engine.evaluation import rows_of
from ..errors import Omini2Error


class WholePicture:
    """A run without token integration: every token of the picture is painted."""

    def check_size(self, height: int, width: int) -> None:
        """Any picture will do."""

    def begin(self) -> None:
        """Before an evaluation."""

    def before_blocks(self, replaced_by: str | None) -> None:
        """Before the model's first block."""

    def select_control(
        self, control: Mapping[str, Any] | None, last_output: int
    ) -> Mapping[str, Any] | None:
        """A ControlNet's residuals for the tokens that are in the model."""
        return control

    def select_mask(self, mask: Tensor | None) -> Tensor | None:
        """The host's attention mask (..., queries, keys) for the tokens that are in the model."""
        return mask

    def finished(self, latent: Tensor, schedule: Sequence[float]) -> Tensor:
        """What the sampler gave."""
        return latent


@dataclass(eq=False)
class Integration(WholePicture):
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
    _there: dict[tuple[int, torch.device, torch.dtype], Tensor] = field(default_factory=dict)

    def check_size(self, height: int, width: int) -> None:
        """Refuses a picture, in latent pixels, of another size than the condition.

        Raises:
            Omini2Error: the sizes differ.
        """
        require_own_size((self.paint.shape[0], self.paint.shape[1]), height, width)

    def begin(self) -> None:
        """Before an evaluation: nothing is taken out yet."""
        self.picture_rows = 0

    def before_blocks(self, replaced_by: str | None) -> None:
        """Before the model's first block: the known tokens are out by now.

        Args:
            replaced_by: what stands in for the model's own forward, if anything.

        Raises:
            Omini2Error: they are not.
        """
        if not self.picture_rows:
            raise Omini2Error(
                f"token_integration: another extension ({replaced_by}) has replaced the model's "
                "forward by one that can't leave tokens out; take it out of the graph or switch "
                "token_integration off."
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
        return select_control(
            control, self.rows, self.paint.numel(), last_output, "switch token_integration off"
        )

    def select_mask(self, mask: Tensor | None) -> Tensor | None:
        """The host's attention mask (..., queries, keys) for the tokens that are left."""
        if mask is None:
            return None
        rows = self.rows(mask.new_empty(1, self.picture_rows, 0)) + self.text_tokens
        kept = torch.cat((torch.arange(self.text_tokens, device=mask.device), rows))
        return mask[..., kept, :][..., kept]

    def finished(self, latent: Tensor, schedule: Sequence[float]) -> Tensor:
        """What the sampler gave, with what is known to the last bit once it has come to its end.

        Samplers add and subtract noise, which floats don't undo exactly.
        """
        if schedule[-1] != 0:
            return latent
        return self.known_in(latent, self.given, range(len(latent)))

    def known_in(self, latent: Tensor, known: Tensor, pictures: Sequence[int] | None) -> Tensor:
        """``latent`` (batch, 16, 2h, 2w) with the known tokens' values taken from ``known``.

        Args:
            pictures: which of the sampler's pictures each row is; None where nobody knows.

        Raises:
            Omini2Error: it matters, and nobody knows.
        """
        if pictures is None:
            if len(known) > 1:
                raise Omini2Error(
                    f"image: it holds {len(known)} images, one for each picture of the batch, but "
                    "another extension runs the model on pictures without saying on which; use one "
                    "image, or take that extension's node off this model."
                )
            pictures = [0] * len(latent)
        paint = self._beside(latent, self.paint, torch.bool)
        paint = paint.repeat_interleave(2, 0).repeat_interleave(2, 1)
        known = self._beside(latent, known, latent.dtype)
        images = [each % len(known) for each in pictures]
        return torch.where(paint, latent, rows_of(known, images))

    def _beside(self, latent: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        """One of its tensors where a latent is; copied once, since copies wait for the device."""
        key = id(t), latent.device, dtype
        if key not in self._there:
            self._there[key] = t.to(latent.device, dtype)
        return self._there[key]


def require_own_size(hw: tuple[int, int], height: int, width: int) -> None:
    """Refuses a condition of ``hw`` tokens on a picture, in latent pixels, of another size.

    Raises:
        Omini2Error: the sizes differ.
    """
    h, w = hw
    if (math.ceil(height / 2), math.ceil(width / 2)) != (h, w) or height % 2 or width % 2:
        raise Omini2Error(
            f"condition: token integration needs a condition of the picture's own size, but "
            f"the condition is {16 * w}x{16 * h} and the picture {8 * width}x{8 * height}; "
            "resize the image or the latent, and paint without area conditioning."
        )


def select_control(
    control: Mapping[str, Any] | None,
    rows: Callable[[Tensor], Tensor],
    tokens: int,
    last: int,
    other_way: str,
    last_kind: str = "output",
) -> dict[str, Any] | None:
    """A ControlNet's residuals for some of the picture's tokens.

    Those behind the last block are added when all rows are back, and stay whole.

    Args:
        rows: gives the indices of the tokens in a residual (batch, tokens, d).
        tokens: how many the picture has.
        last: the last block's number among the residuals of ``last_kind``.
        other_way: out, beside leaving the ControlNet out.

    Raises:
        Omini2Error: residuals for another number of tokens than the picture's.
    """
    if control is None:
        return None

    def selected(residual: Tensor) -> Tensor:
        if residual.shape[1] != tokens:
            raise Omini2Error(
                f"model: the ControlNet gives {residual.shape[1]} rows for a picture of {tokens} "
                f"tokens, so that none can be left out; take it out of the graph, or {other_way}."
            )
        return residual[:, rows(residual)]

    return {
        kind: [
            residual
            if residual is None or (kind == last_kind and i == last)
            else selected(residual)
            for i, residual in enumerate(residuals)
        ]
        for kind, residuals in control.items()
    }

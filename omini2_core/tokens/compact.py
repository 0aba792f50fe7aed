"""Fewer condition tokens: a smaller image with corrected positions, and pruning.

Paper section 3.2. It gives no pruning rule, nor does its code. Ours, for ``prune: empty``: a
condition's *background* is its most frequent colour, and a token is empty if none of its 16x16
pixels differs from the background by more than ``threshold`` in any channel. The largest
difference counts and not the mean, since a thin line covers few of a token's 256 pixels. What is
kept is then widened by ``grow`` tokens in all eight directions, so that a line near a token's
border keeps its neighbour. ``docs/compact-tokens.md`` has the measurements behind the defaults.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Omini2Error, Remedy, require_range, warn
from .condition import TOKEN_PIXELS, Condition, Placement

PRUNE = ("off", "empty", "mask")
COLOUR_LEVELS = 32  # per channel, when the most frequent colour is looked for
# (n, H, W, 3) pixels, height, width -> (n, height, width, 3)
Resize = Callable[[Tensor, int, int], Tensor]


def compressed(hw: tuple[int, int], compression: float) -> tuple[int, int]:
    """Rows and columns of tokens with sides of ``compression`` times these.

    Raises:
        Omini2Error: a side would have no token left.
    """
    require_range("compression", compression, 0, 1)
    h, w = (int(side * compression + 0.5) for side in hw)
    if min(h, w) < 1:
        raise Omini2Error(
            f"compression: {compression:g} leaves no token of {hw[1]}x{hw[0]}; use at least "
            f"{0.5 / min(hw):.3g}."
        )
    return h, w


def compress(
    condition: Condition, compression: float, position_correcting: bool, resize: Resize
) -> Condition:
    """Encodes the condition again from its pixels, with sides of ``compression`` times the size.

    Sides are rounded to whole tokens each, so the aspect changes by half a token at most, and
    with ``position_correcting`` each axis is scaled by its own true ratio: every new token lies at
    the centre of the tokens it stands for. Without it positions stay unscaled (the paper's
    ablation).

    Raises:
        Omini2Error: a side would have no token left, or the condition is a token integration.
    """
    old = condition.hw
    new = compressed(old, compression)
    if new == old:
        return condition
    if condition.paint is not None:
        raise Omini2Error(
            "compression: this condition is a token integration, which needs the picture's own "
            "size; set compression to 1."
        )
    h, w = new
    pixels = resize(condition.pixels, h * TOKEN_PIXELS, w * TOKEN_PIXELS)
    keep = condition.keep
    if keep is not None:
        keep = F.adaptive_max_pool2d(keep[None].float(), (h, w))[0] > 0
    ratio = old[0] / h, old[1] / w
    placement = condition.placement
    if position_correcting:
        placement = replace(
            placement,
            delta=_divide(placement.delta, ratio),
            scale=placement.scale if placement.kind == "fit" else _times(placement.scale, ratio),
        )
    elif placement.kind == "fit":  # which would spread any number of tokens over the picture
        placement = replace(placement, scale=_divide(placement.scale, ratio))
    return replace(
        condition,
        pixels=pixels,
        latent=condition.encode(pixels),
        empty=condition.encode(torch.zeros_like(pixels[:1])),
        placement=placement,
        keep=keep,
    )


def prune(condition: Condition, keep: Tensor) -> Condition:
    """The condition without the tokens that ``keep``, (h, w) bool, leaves out.

    Raises:
        Omini2Error: no token is left.
    """
    if condition.keep is not None:
        keep = keep & condition.keep
    if not keep.any():
        raise Omini2Error(
            "prune: it leaves no token of the condition; lower threshold, raise grow, or check "
            "that the image is not blank and the mask marks the part to keep."
        )
    if keep.all():
        warn(
            "prune: every token is kept, so pruning saves nothing; raise threshold.",
            Remedy({"prune": "off"}),
        )
    return replace(condition, keep=None if keep.all() else keep)


def tokens_with_content(pixels: Tensor, threshold: float, grow: int) -> Tensor:
    """The tokens that are not empty by this module's rule.

    Args:
        pixels: (n, 16*h, 16*w, 3), values 0 to 1; a token counts if it does in any image.
        threshold: the difference to the background, 0 to 1, up to which a token is empty.
        grow: tokens by which the result is widened.

    Returns:
        (h, w) bool, on the CPU.
    """
    require_range("threshold", threshold, 0, 1)
    difference = (pixels - background(pixels)).abs().amax(dim=(0, 3))[None]
    return grown(F.max_pool2d(difference, TOKEN_PIXELS)[0] > threshold, grow).cpu()


def grown(tokens: Tensor, by: int) -> Tensor:
    """(h, w) bool, widened by so many tokens in all eight directions."""
    require_range("grow", by, 0, 1024)
    if not by:
        return tokens
    by = min(int(by), max(tokens.shape))
    return F.max_pool2d(tokens[None].float(), 2 * by + 1, stride=1, padding=by)[0] > 0


def background(pixels: Tensor) -> Tensor:
    """The most frequent colour, (3,): the mean of the fullest cell of a coarse colour grid."""
    colours = pixels.reshape(-1, 3)
    levels = (colours * COLOUR_LEVELS).long().clamp(0, COLOUR_LEVELS - 1)
    cells = (levels[:, 0] * COLOUR_LEVELS + levels[:, 1]) * COLOUR_LEVELS + levels[:, 2]
    fullest = torch.bincount(cells).argmax()
    return colours[cells == fullest].mean(dim=0)


def draw_tokens(condition: Condition) -> Tensor:
    """The condition image with every dropped token dimmed and tinted, (1, 16*h, 16*w, 3)."""
    image = condition.pixels[:1].clone()
    if condition.keep is None:
        return image
    cover = (~condition.keep).repeat_interleave(TOKEN_PIXELS, 0).repeat_interleave(TOKEN_PIXELS, 1)
    tint = torch.tensor([0.45, 0.1, 0.35]).to(image)
    image[:, cover] = 0.35 * image[:, cover] + 0.65 * tint
    # A dark line around each token shows the grid without hiding thin edges.
    edges = torch.zeros_like(cover)
    edges[::TOKEN_PIXELS] = True
    edges[:, ::TOKEN_PIXELS] = True
    image[:, edges] *= 0.8
    return image


def _times(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] * b[0], a[1] * b[1]


def _divide(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] / b[0], a[1] / b[1]


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
    require_on_picture(condition.placement)
    known = ~paint if condition.keep is None else ~paint & condition.keep
    return replace(condition, keep=known, paint=paint, shift_schedule=shift_schedule)


def require_on_picture(place: Placement) -> None:
    """Refuses a token integration that doesn't lie on the picture token by token."""
    on_the_picture = place.kind == "aligned" or (
        place.kind == "custom" and place.delta == (0.0, 0.0)
    )
    if not on_the_picture or place.scale != (1.0, 1.0):
        raise Omini2Error(
            "token_integration: the condition has to lie on the picture token by token; set "
            "placement to aligned and position_scale to 1 in Omini2 Condition Encode."
        )

"""Leaves rows of a model's image stream out of its blocks, by replacing these: take out, put back.

Unlike ``post_input``, which not every model calls, each block's replacement sees positions and mask
too; so it works on every model whose blocks can be replaced.
"""

from typing import Any

import torch
from torch import Tensor

POSITIONS = -4  # the dimension of a rotary embedding (..., rows, head_dim / 2, 2, 2)


class FewerRows:
    """One call of a model, in which some rows of its image stream are left out.

    Attributes:
        began: whether its first block has come by.
    """

    def __init__(self, rows: Tensor, on_picture: int, picture: int, blocks: int) -> None:
        """Args:
        rows: indices of those that stay, the picture's first.
        on_picture: how many of them are the picture's.
        picture: how many there have to be behind the last block.
        blocks: how many the model has.
        """
        self.began = False
        self._rows = rows
        self._on_picture = rows[:on_picture]
        self._picture = picture
        self._last = blocks - 1
        self._text = 0
        self._kept = rows
        self._whole = 0
        self._pe: tuple[Any, Any] = (None, None)

    def before(self, number: int, args: dict[str, Any]) -> dict[str, Any]:
        """What a block is to be given for what the model would give it."""
        changes: dict[str, Any] = {}
        if number == 0:
            self.began = True
            self._text, images = args["txt"].shape[1], args["img"].shape[1]
            self._whole = self._text + images
            text = torch.arange(self._text, device=self._rows.device)
            self._kept = torch.cat((text, self._text + self._rows))
            changes["img"] = args["img"][:, self._rows]
        pe, mask = args.get("pe"), args.get("attn_mask")
        if pe is not None:
            if self._pe[0] is not pe:
                self._pe = pe, pe.index_select(POSITIONS, self._kept)
            changes["pe"] = self._pe[1]
        if mask is not None and mask.shape[-1] == self._whole:
            mask = mask[..., self._kept]
            changes["attn_mask"] = mask if mask.shape[-2] == 1 else mask[..., self._kept, :]
        return {**args, **changes}

    def after(self, number: int, out: dict[str, Any]) -> dict[str, Any]:
        """What the model is to get of a block; behind the last all rows, zero where none was."""
        if number != self._last:
            return out
        hidden = out["img"]
        text = 0 if "txt" in out else self._text
        full = hidden.new_zeros(hidden.shape[0], text + self._picture, hidden.shape[2])
        full[:, :text] = hidden[:, :text]
        there = self._on_picture
        full[:, text + there] = hidden[:, text : text + len(there)]
        return {**out, "img": full}


def turn_of(args: dict[str, Any], picture: int) -> Tensor | None:
    """From the first reference's places to the picture's, out of what a first block is given.

    Returns:
        (1, 1, picture, head_dim / 2, 2, 2), a rotation for each pair of numbers.
    """
    pe, text = args.get("pe"), args["txt"].shape[1]
    if pe is None or pe.shape[POSITIONS] < text + 2 * picture:
        return None
    here = pe[:1].narrow(POSITIONS, text, picture).float()
    there = pe[:1].narrow(POSITIONS, text + picture, picture).float()
    turn: Tensor = here @ there.transpose(-1, -2)
    return turn

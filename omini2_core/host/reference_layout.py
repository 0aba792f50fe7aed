"""Where a prompt's references lie in a call of the model, and which of their rows take part.

The model's own code places references by the sizes of their latents. One that was made smaller and
keeps standing for the whole gets its positions from where the whole would lie: the model is asked
for these, once, by its own ``post_input``.
"""

import inspect
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..digest import digest
from ..engine.attention import log_scale
from ..engine.compiled import uncompiled
from ..engine.evaluation import Moment
from ..engine.references import Tail
from ..errors import Omini2Error, Remedy, warn
from ..tokens.condition import TOKEN_PIXELS
from . import versions
from .reference_calls import apart
from .reference_settings import PromptReferences, ReferenceSettings
from .references import Family, family_of
from .setup import LATENT
from .sources import end_sigma, start_sigma

Said = Sequence[ReferenceSettings | None]
Size = tuple[int, int]  # rows, columns
BY_PICTURE = "uxo"  # the one method that places references by the picture's size


@dataclass(frozen=True, eq=False)
class Layout:
    """The references in one call.

    Attributes:
        latents: what the model is handed; those behind the last that takes part are not.
        tail: the rows that take part.
        which: of the prompt's references take part.
        counts: how many rows of each latent do.
        rows: which of the latents' rows do; None for all.
        ids: (1, rows, axes), where the latents' rows lie; None leaves that to the model.
        name: of what isn't in the latents.
    """

    latents: Sequence[Tensor]
    tail: Tail
    which: Hashable = None
    counts: Sequence[int] = ()
    rows: Tensor | None = None
    ids: Tensor | None = None
    name: str = ""

    @property
    def moves_rows(self) -> bool:
        """Whether the model's own rows and positions aren't what they are to be."""
        return self.rows is not None or self.ids is not None

    def post_input(self, args: dict[str, Any], total: int) -> dict[str, Any]:
        """The model's ``post_input`` patch: takes rows out and puts the others in their places.

        Args:
            total: the rows that the model has made of the latents.
        """
        img, ids = args["img"], args["img_ids"]
        first = img.shape[1] - total
        rows, places = img[:, first:], ids[:, first:]
        if self.ids is not None:
            places = self.ids.to(ids).expand(len(ids), -1, -1)
        if self.rows is not None:
            rows, places = rows[:, self.rows], places[:, self.rows]
        options = args.get("transformer_options", {})
        if "reference_image_num_tokens" in options:  # not older hosts
            options["reference_image_num_tokens"] = list(self.counts)
        joined = torch.cat((img[:, :first], rows), 1), torch.cat((ids[:, :first], places), 1)
        return {**args, "img": joined[0], "img_ids": joined[1]}


class Layouts:
    """The layouts of one run."""

    def __init__(self, family: Family, module: Any, sampling: Any) -> None:
        """Args:
        module: the diffusion model.
        sampling: the host's, which knows what noise a share of sampling begins with.
        """
        self._family = family
        self._module = module
        self._sampling = sampling
        self._known: dict[Hashable, Layout] = {}

    def tokens(self, latents: Sequence[Tensor], said: Said | None = None) -> int:
        """How many rows take part of references, where these do."""
        masks = [each.keep for each in said or () if each is not None and each.keep is not None]
        left_out = sum(int((~keep).sum()) for keep in masks)
        return self._family.tokens(self._module, latents) - left_out

    @uncompiled
    def of(
        self, executor: Any, bound: inspect.BoundArguments, said: Said | None, moment: Moment
    ) -> Layout:
        """The references of a call.

        Args:
            executor: of the model's forward.
            said: what is said of each, if anything of any.

        Raises:
            Omini2Error: the host gives no way to do that with this model.
        """
        latents: Sequence[Tensor] = bound.arguments["ref_latents"]
        if said is None:
            return Layout(latents, Tail(((self.tokens(latents), 0.0),)))
        active = tuple(self._takes_part(each, moment) for each in said)
        last = max((i for i, on in enumerate(active) if on), default=-1)
        latents = latents[: last + 1]
        x, options = bound.arguments["x"], bound.arguments["transformer_options"]
        method = self._family.method(self._module, bound.arguments)
        shapes = tuple(t.shape[1:] for t in (x, *latents))
        rope = repr(options.get("rope_options"))
        key = tuple(map(id, said)), active, shapes, method, rope
        if key not in self._known:
            parts = [
                _Part(latent, each, on)
                for latent, each, on in zip(latents, said, active, strict=False)
            ]
            self._known[key] = self._laid_out(executor, bound, parts, active)
        return replace(self._known[key], latents=latents)

    def _takes_part(self, said: ReferenceSettings | None, moment: Moment) -> bool:
        if said is None or said.always:
            return True
        start = start_sigma(self._sampling, said.start_percent)
        end = end_sigma(self._sampling, said.end_percent)
        return start >= moment.sigma >= end

    def _laid_out(
        self,
        executor: Any,
        bound: inspect.BoundArguments,
        parts: Sequence["_Part"],
        active: Hashable,
    ) -> Layout:
        keeps = [part.keep(self.tokens([part.latent])) for part in parts]
        counts = [int(keep.sum()) for keep in keeps]
        runs = [(n, part.bias) for n, part in zip(counts, parts, strict=True) if n]
        kept = torch.cat([torch.ones(0, dtype=torch.bool), *keeps])
        sizes = [part.size for part in parts]
        moved = any(part.is_smaller for part in parts)
        if moved or not kept.all():
            require_rows_to_move([part.said for part in parts], self._module, self._family)
        return Layout(
            (),
            Tail(tuple(runs)),
            active,
            counts,
            None if kept.all() else kept.nonzero()[:, 0].to(bound.arguments["x"].device),
            self._places(executor, bound, parts) if moved else None,
            digest([repr((active, sizes)), kept]),
        )

    def _places(
        self, executor: Any, bound: inspect.BoundArguments, parts: Sequence["_Part"]
    ) -> Tensor:
        """Where all rows of the references lie, (1, rows, axes)."""
        side = self._family.patch(self._module)
        wholes = [part.latent.new_zeros(1, *part.latent.shape[1:-2], *part.size) for part in parts]
        tokens = [self.tokens([whole]) for whole in wholes]
        method = self._family.placing_method(self._module, bound.arguments)
        picture = bound.arguments["x"]
        found = _asked(executor, bound, picture, wholes, method)[-sum(tokens) :]
        return torch.cat(
            [
                part.spread(ids, side) if part.is_smaller else ids
                for part, ids in zip(parts, found.split(tokens), strict=True)
            ]
        )[None]


@dataclass(frozen=True, eq=False)
class _Part:
    """One reference in a call, and whether it takes part."""

    latent: Tensor
    said: ReferenceSettings | None
    active: bool

    @property
    def bias(self) -> float:
        """What is added to the logits towards it."""
        return 0.0 if self.said is None else log_scale(self.said.strength)

    @property
    def size(self) -> Size:
        """Rows and columns of the latent whose place it takes."""
        placed = None if self.said is None else self.said.placed
        return placed or (self.latent.shape[-2], self.latent.shape[-1])

    @property
    def is_smaller(self) -> bool:
        """Whether it stands for a larger one."""
        return self.size != tuple(self.latent.shape[-2:])

    def keep(self, rows: int) -> Tensor:
        """Which of its rows take part, (rows,) bool on the CPU."""
        if self.active and self.said is not None and self.said.keep is not None:
            return self.said.keep.flatten()
        return torch.full((rows,), self.active)

    def spread(self, ids: Tensor, side: int) -> Tensor:
        """Where its rows lie among those of the whole, at the centre of what each stands for.

        Args:
            ids: (rows, axes) of the whole.
            side: latent pixels along a token's side.
        """
        h, w = (math.ceil(n / side) for n in self.size)
        small = (math.ceil(n / side) for n in self.latent.shape[-2:])
        grid = ids.view(h, w, -1)
        place = grid[0, 0]
        for axis, (n, whole) in enumerate(zip(small, (h, w), strict=True)):
            step = grid.select(axis, min(1, whole - 1)).select(0, 0) - grid[0, 0]
            scale = whole / n
            at = torch.arange(n, dtype=ids.dtype, device=ids.device) * scale + (scale - 1) / 2
            place = place + (at[:, None, None] if axis == 0 else at[:, None]) * step
        return place.flatten(0, 1)


class _Placed(Exception):
    """The model has placed its rows, which is all that it was asked for."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.ids = ids


def _asked(
    executor: Any,
    bound: inspect.BoundArguments,
    picture: Tensor,
    latents: Sequence[Tensor],
    method: str | None,
) -> Tensor:
    """Where the model places the rows of its picture and references, (rows, axes)."""

    def stop(args: dict[str, Any]) -> dict[str, Any]:
        raise _Placed(args["img_ids"][0])

    call = apart(bound, [0], picture, latents, method, stop)
    try:
        executor.original(*call.args, **call.kwargs)
    except _Placed as placed:
        return placed.ids
    raise unreached()


def require_rows_to_move(settings: Said, module: Any, family: Family) -> None:
    """Refuses settings on a model whose rows can't be left out or moved on this host.

    Raises:
        Omini2Error: which of them, and the way out.
    """
    if versions.calls_post_input(type(module)):
        return
    found = [each for each in settings if each is not None]
    if any(each.keep is not None for each in found):
        name, otherwise = "mask", "disconnect it"
    elif any(each.placed is not None for each in found):
        name, otherwise = "position_correcting", "switch it off or set compression to 1"
    else:
        name, otherwise = "end_percent", "put that reference behind the prompt's others"
    raise Omini2Error(
        f"{name}: this ComfyUI has no way to move {family.name}'s references or to leave out a "
        f"part of them; update ComfyUI, or {otherwise}."
    )


def unreached() -> Omini2Error:
    """The model didn't come by where its rows are moved or looked at."""
    return Omini2Error(
        "model: another extension has replaced its forward or its attention by one that goes past "
        "ComfyUI's, so what Omini2 Reference says can't be done; take it out of the graph, or use "
        "Reference Latent."
    )


def warn_about_sizes(
    prompts: Sequence[PromptReferences], model: ModelPatcher, noise: Tensor
) -> None:
    """Says it where a reference of ours isn't as large as the picture that it is to lie on.

    Only of each prompt's first: the model may lay the others beside it.
    """
    family = family_of(model)
    if family is None:
        return
    side = TOKEN_PIXELS // family.patch(model.model.diffusion_model)
    picture = tuple(noise.shape[-2:])
    for prompt in prompts:
        first = prompt.settings[0]
        method = prompt.method or family.default_method(model.model.diffusion_model)
        if first is None or first.size == picture or method in (None, BY_PICTURE):
            continue
        (height, width), (rows, columns) = picture, first.size
        warn(
            f"image: the picture is {side * width}x{side * height} and this reference "
            f"{side * columns}x{side * rows}, and {family.name} lays the {family.origin} of one on "
            "that of the other; set fit to picture and connect latent if what they show is to lie "
            "in the same place.",
            Remedy({"width": side * columns, "height": side * rows}, LATENT),
        )
        return

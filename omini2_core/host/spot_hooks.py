"""What one run of Spot Edit installs into ComfyUI, beside what references have anyway.

Around the sampler's call: which tokens are computed, and what the others are denoised to. Around
the model's forward: with or without references. In its blocks: rows are taken out and put back. In
its attention: what is kept stands for what is left out.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..engine.compiled import uncompiled, uncompiled_itself
from ..engine.evaluation import Chunk, Schedule, rows_of
from ..engine.spot import Plan, SpotState
from ..engine.spot_keys import ImageRows, SpotKeys
from ..errors import Omini2Error, warn
from .fewer_rows import FewerRows, turn_of
from .hooks import original_of
from .integration import select_control
from .model import replaced_forward
from .reference_calls import changed
from .reference_hooks import ReferenceHooks
from .reference_layout import Said
from .reference_settings import PromptReferences
from .references import T0_METHOD, Family
from .setup import KEY, Setup

NODE = "Omini2 Spot Edit"


class SpotHooks(ReferenceHooks):
    """One run's hooks for Spot Edit."""

    def __init__(
        self,
        keys: SpotKeys,
        state: SpotState,
        family: Family,
        model: ModelPatcher,
        schedule: Sequence[float],
        noise: Tensor,
        latents: Sequence[Sequence[Tensor]],
        shown: Setup,
        beside: int,
    ) -> None:
        """Args:
        schedule: the noise levels.
        noise: of the pictures.
        latents: each prompt's references; some may have none.
        beside: bytes that the choice takes on the model's device.
        """
        prompts = [PromptReferences(each, (None,) * len(each)) for each in latents]
        super().__init__(keys, family, model, schedule, noise, prompts, False, shown)
        self._beside = beside
        self._keys = keys
        self._state = state
        self._steps = Schedule(schedule)
        self._sigma = 0.0
        self._computed = self._of = 0
        self._in_the_way = self._left_out = False
        self._fewer: FewerRows | None = None

    def install(self, to: dict[str, Any]) -> None:
        """Puts the hooks into a run's own transformer options."""
        super().install(to)
        add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self.predict_noise, to)
        slots = to.setdefault("patches_replace", {}).setdefault("dit", {})
        for (kind, i), number in self._numbers.items():
            slot = f"{kind}_block", i
            slots[slot] = self._block_hook(number, slots.get(slot))

    def close(self) -> None:
        """Frees what the run holds, and sums up what it did."""
        self._keys.finish()
        self.stats.note(self._keys.cache)
        self.stats.spot = self._state.stats
        self._keys.cache.close()
        if self._in_the_way and not self._left_out:
            warn(
                "model: another extension, or prompts for parts of the picture, keep Spot Edit "
                "from leaving tokens out, so nothing was saved; take them out of the graph for the "
                "speed."
            )

    def finished(self, latent: Tensor) -> Tensor:
        """What the sampler gave, with the reference's own latent where tokens were left as it."""
        return self._state.finished(latent)

    def _kv_bytes(self, model: ModelPatcher, batch: int) -> int:
        if not self._state.saves:
            return 0
        tokens = sum(self._behind_text(each.latents).held for each in self._prompts)
        return batch * tokens * self._family.kv_bytes_per_token(model)

    @uncompiled_itself
    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Around each of the sampler's calls, with all prompts and their guidance within."""
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        x: Tensor = bound.arguments["x"]
        if (x.shape[-2], x.shape[-1]) != self.canvas:
            raise Omini2Error(
                "model: this sampler changes the picture's size as it goes, and Spot Edit can't "
                "tell where the reference lies then; choose another sampler."
            )
        self._sigma = float(bound.arguments["timestep"].flatten()[0])
        self._steps.call()
        plan = self._state.begin(self._steps.step(self._sigma))
        self._computed = self._of = 0
        try:
            if plan.idle:  # nothing of the model's work would be left
                self._of, out = 1, x
            else:
                out = executor(*args, **kwargs)
            out = self._state.frozen(out)
        finally:
            self._state.plan = None
        self._state.end(out)
        if self._of:
            self._state.stats.shares.append(self._computed / self._of)
        return out

    def _concerns(self, arguments: Mapping[str, Any]) -> bool:
        return self._state.plan is not None

    @uncompiled_itself
    def _evaluate(
        self, executor: Any, bound: inspect.BoundArguments, tag: Tensor | None, said: Said | None
    ) -> Any:
        arguments, plan, keys = bound.arguments, self._state.plan, self._keys
        assert plan is not None
        x, references = arguments["x"], arguments.get("ref_latents") or ()
        chunks, _ = self._moment_of(arguments, tag)
        images = self._behind_text(references)
        parts = keys.parts(chunks) if images.held else []
        known = x.shape[2:] == self._picture and all(chunk.key is not None for chunk in chunks)
        full = plan.full or not known or any(part.due for part in parts)
        self._in_the_way |= full and not plan.full
        self._left_out |= not full
        rows = self._rows_left(plan, images, full) if known else None
        # References at time 0 are told by where they lie, so that no row may be missing.
        method = self._family.method(self._model, arguments)
        only = rows if full and references and method == T0_METHOD else None
        text = arguments["context"].shape[1]
        whole = text + images.picture + images.reference
        if rows is not None and only is None:
            self._require_own_forward()
            assert plan.rows is not None
            sizes = len(plan.rows), images.picture, len(self._numbers)
            self._fewer = FewerRows(rows, *sizes)
            self._count(text + len(rows), whole)
        else:
            self._count(whole, whole)
        left = None if plan.full else keys.left_out(images, plan, self._sigma)
        try:
            if not full:
                assert left is not None
                with keys.leaving_out(parts, left, x.device):
                    out = self._run(executor, bound, {"ref_latents": None})
            elif plan.full or not known:
                with keys.writing(parts if known and plan.keeps else [], images, only):
                    out = self._run(executor, bound, {})
            else:
                late = [part for part in parts if part.due]
                others = [part for part in parts if not part.due]
                with keys.writing(late, images, only, others, left):
                    out = self._run(executor, bound, {})
        finally:
            self._fewer = None
        return self._velocity(out, x, chunks) if known else out

    def _run(self, executor: Any, bound: inspect.BoundArguments, changes: dict[str, Any]) -> Any:
        control, plan = bound.arguments.get("control"), self._state.plan
        if self._fewer is not None and control is not None:
            assert plan is not None and plan.rows is not None
            kind, last = list(self._numbers)[-1]
            control = select_control(
                control,
                lambda residual: plan.rows,  # type: ignore[arg-type,return-value]
                self._state.tokens,
                last,
                f"take {NODE} off this model",
                "output" if kind == "single" else "input",
            )
            changes = {**changes, "control": control}
        given = changed(bound, changes)
        return executor(*given.args, **given.kwargs)

    def _require_own_forward(self) -> None:
        """Others' forwards compare what goes in with what comes out, which is fewer rows here."""
        by = replaced_forward(self._model) if hasattr(self._model, "forward_orig") else None
        if by is not None:
            raise Omini2Error(
                f"model: another extension ({by}) has replaced the model's forward by one that "
                f"can't leave tokens out; take it out of the graph, or {NODE}."
            )

    def _behind_text(self, references: Sequence[Tensor]) -> ImageRows:
        tokens = self._family.tokens(self._model, references)
        picture = self._state.tokens
        return ImageRows(picture, tokens, tokens if self._state.by_mask else picture + tokens)

    def _rows_left(self, plan: Plan, images: ImageRows, full: bool) -> Tensor | None:
        """Indices of the picture's and the references' rows that the model is to have."""
        if not full:
            return plan.rows
        if not self._state.by_mask or plan.rows is None:
            return None
        behind = torch.arange(images.reference, device=plan.rows.device) + images.picture
        return torch.cat((plan.rows, behind))

    @uncompiled
    def _count(self, computed: int, of: int) -> None:
        self._computed += computed
        self._of += of

    def _velocity(self, out: Tensor, x: Tensor, chunks: Sequence[Chunk]) -> Tensor:
        """What the model would have to say of unedited tokens for them to stay as they are.

        Guidance and other extensions look at the whole picture.
        """
        pictures = {
            row: picture
            for chunk in chunks
            for row, picture in zip(chunk.rows, chunk.pictures or (), strict=False)
        }
        if not self._sigma or len(pictures) != len(x):
            return out
        order = [pictures[row] for row in range(len(x))]
        return self._state.frozen(out, lambda kept: (x - rows_of(kept, order).to(x)) / self._sigma)

    def _block_hook(self, number: int, previous: Callable[..., Any] | None) -> Callable[..., Any]:
        """The replacement of one block, around the one that is there already."""

        @uncompiled_itself
        def replacement(args: dict[str, Any], extra: dict[str, Any]) -> Any:
            fewer, keys = self._fewer, self._keys
            if fewer is not None:
                args = fewer.before(number, args)
            elif number == 0 and keys.seen is not None and keys.fuses and keys.turn is None:
                keys.turn = turn_of(args, self._state.tokens)
            out = original_of(previous, extra["original_block"], args, extra)()
            return out if fewer is None else fewer.after(number, out)

        return replacement

    @uncompiled
    def attention(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """The attention of a block, with q and k after RoPE."""
        if self._fewer is not None and not self._fewer.began:
            raise Omini2Error(
                "model: another extension runs the model's blocks past ComfyUI's hooks, so that "
                f"tokens can't be left out; take it out of the graph, or {NODE}."
            )
        return super().attention(function, *args, **kwargs)

"""Draws a cell's pictures through the nodes and the stock KSampler's path.

Imports the host: `benchmarks.host.start()` comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.sample
import folder_paths
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

import omini2_extension.nodes as nodes
from benchmarks.study import edits
from benchmarks.study.cells import STEPS, Cell, Use
from benchmarks.study.conditions import SIDE, TOKEN, Truth, condition_images
from benchmarks.study.edits import DrawnEdits, EditCell, EditTruth
from dev.demo_model import scenes
from omini2_extension.omini2_core.demo import model as demo_model
from omini2_extension.omini2_core.errors import Omini2Error

GUIDANCE = 3.5  # the demo model was trained to give the same with any
SUBJECT_SIDE = 128  # where a LoRA's file doesn't say


@dataclass
class Drawn:
    """A batch of a cell.

    Attributes:
        pictures: (n, 256, 256, 3) bytes.
        latents: (n, 16, 32, 32) float32.
        kept: (n, 16, 16) bool: where of the picture the first condition has tokens.
        tokens: (n,) condition tokens in all.
    """

    pictures: np.ndarray
    latents: np.ndarray
    kept: np.ndarray
    tokens: np.ndarray

    @classmethod
    def joined(cls, parts: list[Drawn]) -> Drawn:
        """Several as one."""
        names = ("pictures", "latents", "kept", "tokens")
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


@dataclass(eq=False)
class Batch:
    """Some scenes, with what several cells need of them.

    The condition that the VAE has encoded, and pictures drawn one by one by what tells them apart.
    """

    truths: list[Any]
    conditions: dict[Any, Any] = field(default_factory=dict)
    singles: dict[Any, Drawn] = field(default_factory=dict)


class Studio:
    """The demo model with the study's LoRAs."""

    def __init__(self, model_folder: Path, loras: Path) -> None:
        demo_model.FOLDER = model_folder
        folder_paths.add_model_folder_path("loras", str(loras), is_default=True)
        folder_paths.filename_list_cache.pop("loras", None)
        self.loras = loras
        args = comfy.cli_args.args
        args.bf16_vae = True
        _, self.clip, self.vae = demo_model.load()
        self.vae.first_stage_model.to(memory_format=torch.channels_last)
        self._models: dict[str, Any] = {}

    def model(self, floats: str) -> Any:
        """The transformer in these numbers."""
        if floats not in self._models:
            args = comfy.cli_args.args
            args.bf16_unet = floats == "bfloat16"
            model = demo_model._load_transformer()
            args.bf16_unet = False
            if floats == "bfloat16":
                # The host takes 16 bits for storage alone on a CPU; these have them in hardware.
                model.model.manual_cast_dtype = None
            self._models[floats] = model
        return self._models[floats]

    def draw(self, cell: Cell | EditCell, batch: Batch) -> Drawn | DrawnEdits:
        """The cell's pictures of a batch of scenes; the same noise for a scene in every cell."""
        if isinstance(cell, EditCell):
            return edits.draw(self, cell, batch.truths)
        if not cell.alone:
            return self._draw(cell, batch.truths, batch)
        return Drawn.joined(
            [self._single(cell, truth, batch, row) for row, truth in enumerate(batch.truths)]
        )

    def _single(self, cell: Cell, truth: Truth, batch: Batch, row: int) -> Drawn:
        """One picture; cells that keep the same tokens of it, whatever the threshold, share it."""
        one = Batch([truth], batch.conditions)
        conditions = [self._condition(use, one, row) for use in cell.uses]
        kept = tuple(
            None if c is None else (c.keep.numpy().tobytes() if c.keep is not None else b"all")
            for c in conditions
        )
        plain = replace(cell, uses=tuple(replace(u, threshold=None, grow=0) for u in cell.uses))
        key = plain, kept, row
        if key not in batch.singles:
            batch.singles[key] = self._draw(cell, [truth], one, row)
        return batch.singles[key]

    def _draw(self, cell: Cell, truths: list[Truth], batch: Batch, row: int | None = None) -> Drawn:
        model, n = self.model(cell.floats), len(truths)
        kept, tokens = np.ones((n, SIDE // TOKEN, SIDE // TOKEN), bool), 0
        for index, use in enumerate(cell.uses):
            condition = self._condition(use, batch, row)
            if condition is None:  # pruning left nothing of it
                kept[:] = kept[:] if index else False
                continue
            tokens += condition.token_count
            if index == 0 and condition.keep is not None:
                times = SIDE // TOKEN // condition.hw[0]
                kept[:] = np.kron(condition.keep.numpy(), np.ones((times, times), bool))
            model = nodes.ApplyLora.execute(
                model, condition, f"{use.lora}.safetensors", 1.0, use.scale, use.attention, 0.0, 1.0
            )[0]
        if cell.uses and cell.reuse != "off":
            exact = cell.reuse == "exact"
            reuse, every = ("auto", 1) if exact else (cell.reuse, cell.every)
            model = nodes.ConditionCache.execute(model, reuse, every, "model", "auto")[0]
        latent = torch.zeros(n, 16, SIDE // 8, SIDE // 8)
        say: Callable[[scenes.Scene], str] = (
            scenes.subject_caption if cell.subject_prompt else scenes.full_caption
        )
        prompt = self.prompt([say(t.scene) for t in truths])
        latents = comfy.sample.sample(
            model, noise_of(truths), STEPS, 1.0, "euler", "simple", prompt, prompt, latent,
            disable_pbar=True, seed=0,
        )  # fmt: skip
        pictures = self.vae.decode(latents).float().clamp(0, 1)
        return Drawn(
            np.round(pictures.numpy() * 255).astype(np.uint8),
            latents.float().numpy(),
            kept,
            np.full(n, tokens),
        )

    def prompt(self, texts: list[str]) -> list[Any]:
        """A text for each picture, as one batch of conditioning."""
        encoded = [
            self.clip.encode_from_tokens(self.clip.tokenize(text), return_pooled=True)
            for text in texts
        ]
        text, pooled = (torch.cat(part).float() for part in zip(*encoded, strict=True))
        return [[text, {"pooled_output": pooled, "guidance": GUIDANCE}]]

    def _condition(self, use: Use, batch: Batch, row: int | None) -> Any:
        """Condition Encode and Compact Tokens; None if pruning leaves no token."""
        side, placement, delta = SIDE, "aligned", (0, 0)
        if use.task == "subject":
            side, delta = self._subject(use.lora)
            placement = "custom"
        # Integration keeps the known tokens of a whole picture, as in training; beside a black hole
        # they would be encoded with some of its black in them.
        task = "picture" if use.integrate else use.task
        key = task, side, row
        if key not in batch.conditions:
            images = condition_images(task, batch.truths, side)
            batch.conditions[key] = nodes.ConditionEncode.execute(
                images, self.vae, placement, *delta, 1.0
            )[0]
        condition = batch.conditions[key]
        mask = torch.from_numpy(batch.truths[0].hole)[None].float() if use.integrate else None
        prune = "off" if use.threshold is None else "empty"
        try:
            return nodes.CompactTokens.execute(
                condition, use.compression, use.correcting, prune, use.threshold or 0.0, use.grow,
                use.integrate, mask, shift_schedule=False,
            )[0]  # fmt: skip
        except Omini2Error as error:
            if prune == "empty" and str(error).startswith("prune:"):
                return None
            raise

    def _subject(self, lora: str) -> tuple[int, tuple[int, int]]:
        """Side in pixels and shift in tokens that a subject's LoRA was trained with."""
        with safe_open(self.loras / f"{lora}.safetensors", "pt") as file:
            said = file.metadata() or {}
        side = int(said.get("omini2.condition_size", f"{SUBJECT_SIDE}x").partition("x")[0])
        rows, _, columns = said.get("omini2.position_delta", f"0,{side // TOKEN}").partition(",")
        return side, (round(float(rows)), round(float(columns or rows)))


def noise_of(truths: Sequence[Truth | EditTruth]) -> Tensor:
    """(n, 16, 32, 32), each scene's own."""
    size = 16, SIDE // 8, SIDE // 8
    generators = [torch.Generator().manual_seed(truth.seed) for truth in truths]
    return torch.stack([torch.randn(size, generator=g) for g in generators])

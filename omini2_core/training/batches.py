"""Which samples a step trains on, and what is drawn for each.

Everything follows from the seed and the sample's number in the run alone: not from the process
that computes it, nor from where a run was interrupted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..condition import Placement, pack, token_positions
from .branch import ConditionTokens
from .conditions import random_rectangle
from .config import TrainConfig
from .encode import EncodedData
from .lora_file import adapter_name


@dataclass(frozen=True, eq=False)
class Example:
    """One sample with everything that is drawn for it; lists go by condition.

    Attributes:
        clean, noise: (n, 64) tokens in the picture branch.
        ids: (n, 3) their positions.
        time: 0 to 1.
        text, pooled: the caption's features, or the empty prompt's.
        conditions: (m, 64) tokens.
        condition_ids: (m, 3) their positions.
    """

    clean: Tensor
    noise: Tensor
    ids: Tensor
    time: Tensor
    text: Tensor
    pooled: Tensor
    conditions: list[Tensor]
    condition_ids: list[Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples side by side; where they differ in length, ``kept`` says what isn't padding."""

    clean: Tensor
    noise: Tensor
    ids: Tensor
    time: Tensor
    text: Tensor
    pooled: Tensor
    conditions: list[ConditionTokens]
    kept: Tensor | None
    text_kept: Tensor | None

    @property
    def noisy(self) -> Tensor:
        """The picture's tokens at their time: (1 - t) picture + t noise."""
        t = self.time[:, None, None]
        return (1 - t) * self.clean + t * self.noise

    def loss(self, velocity: Tensor) -> Tensor:
        """The mean squared error of a velocity to noise - picture, each sample weighing the same.

        The original's objective (``OminiModel.training_step``).
        """
        error = (velocity.float() - (self.noise - self.clean)).square().mean(-1)
        if self.kept is None:
            return error.mean()
        return ((error * self.kept).sum(1) / self.kept.sum(1)).mean()


class Drawer:
    """Draws the samples of a run by their number."""

    def __init__(self, config: TrainConfig, data: EncodedData) -> None:
        self._config, self._data = config, data
        width, height = config.target_size
        self._hw = height // 16, width // 16
        self._ids = _with_index(token_positions(self._hw, Placement(), self._hw))
        self._condition_ids = []
        for index in range(len(config.conditions)):
            width, height = config.condition_size(index)
            placed = token_positions((height // 16, width // 16), config.placement(index), self._hw)
            self._condition_ids.append(_with_index(placed))

    def example(self, number: int) -> Example:
        """The run's ``number``-th sample, from 0."""
        config, data = self._config, self._data
        epoch, place = divmod(number, len(data))
        key, text_key = data.items[_order(config.seed, epoch, len(data))[place]]
        tensors = data.load(key)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + 7 * number + 1)
        time = torch.sigmoid(torch.randn((), generator=generator))
        drop_text = torch.rand((), generator=generator) < config.drop_text_prob
        text = data.load(data.empty_text if drop_text else text_key)
        clean = pack(tensors["target"][None])[0]
        noise = torch.randn(clean.shape, generator=generator)
        ids, paint = self._ids, None
        conditions, condition_ids = [], []
        for index, condition in enumerate(config.conditions):
            drop_image = torch.rand((), generator=generator) < config.drop_image_prob
            own_ids = self._condition_ids[index]
            if condition.integration:
                paint = tensors.get("paint")
                if paint is None:
                    paint = random_rectangle(*self._hw, generator)
                known = ~paint.flatten()
                conditions.append(clean[known])
                condition_ids.append(own_ids[known])
                continue
            name = f"{index}.{epoch % condition.variants}"
            latent = data.black[index] if drop_image else tensors[f"condition.{name}"]
            tokens, kept = pack(latent[None])[0], tensors.get(f"kept.{name}")
            if kept is not None:
                # A dropped image is black where it was: what image guidance evaluates.
                tokens, own_ids = tokens[kept.flatten()], own_ids[kept.flatten()]
            conditions.append(tokens)
            condition_ids.append(own_ids)
        if paint is not None:
            rows = paint.flatten()
            clean, noise, ids = clean[rows], noise[rows], ids[rows]
        return Example(
            clean, noise, ids, time, text["features"], text["pooled"], conditions, condition_ids
        )

    def batch(self, numbers: Sequence[int], device: torch.device) -> Batch:
        """Several samples by their numbers."""
        return collate([self.example(number) for number in numbers], self._config, device)


def collate(examples: list[Example], config: TrainConfig, device: torch.device) -> Batch:
    """Examples side by side on a device."""

    def side_by_side(tensors: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        padded, kept = _padded(tensors)
        return padded.to(device), None if kept is None else kept.to(device)

    clean, kept = side_by_side([e.clean for e in examples])
    noise, _ = side_by_side([e.noise for e in examples])
    ids, _ = side_by_side([e.ids for e in examples])
    text, text_kept = side_by_side([e.text for e in examples])
    conditions = []
    for index, condition in enumerate(config.conditions):
        tokens, own_kept = side_by_side([e.conditions[index] for e in examples])
        own_ids, _ = side_by_side([e.condition_ids[index] for e in examples])
        conditions.append(
            ConditionTokens(
                tokens, own_ids, adapter_name(index), condition.independent_condition, own_kept
            )
        )
    return Batch(
        clean,
        noise,
        ids,
        torch.stack([e.time for e in examples]).to(device),
        text,
        torch.stack([e.pooled for e in examples]).to(device),
        conditions,
        kept,
        text_kept,
    )


def _padded(tensors: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(n_i, d) each -> (batch, max n, d), and which rows are real, unless all are."""
    lengths = [len(t) for t in tensors]
    longest = max(*lengths, 1)
    if all(length == longest for length in lengths):
        return torch.stack(tensors), None
    rows = [F.pad(t, (0, 0, 0, longest - len(t))) for t in tensors]
    return torch.stack(rows), torch.arange(longest) < torch.tensor(lengths)[:, None]


def _with_index(positions: Tensor) -> Tensor:
    """(n, 2) rows and columns -> (n, 3) position ids."""
    return F.pad(positions, (1, 0))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order

"""Which samples a step trains on, and what is drawn for each.

Everything follows from the seed, the sample's number in the run and, while a condition fades in,
the step: not from the process that computes it, nor from where a run was interrupted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens.condition import Placement, pack, token_positions
from .branch import ConditionTokens
from .conditions import random_rectangle
from .config import ConditionConfig, TrainConfig
from .encode import EncodedData
from .lora_file import adapter_name

REFERENCE_INDEX = 1  # the first number of a reference's position ids in FLUX.1 Kontext


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
        index = 0 if config.references == "off" else REFERENCE_INDEX
        self._condition_ids = [
            [
                _with_index(
                    token_positions(
                        (size[1] // 16, size[0] // 16), config.placement(number, size), self._hw
                    ),
                    index,
                )
                for size in config.condition_sizes(number)
            ]
            for number in range(len(config.conditions))
        ]

    def example(
        self, number: int, sizes: Sequence[int] | None = None, step: int | None = None
    ) -> Example:
        """The run's ``number``-th sample, from 0.

        Args:
            sizes: for each condition, which of its sizes it has; the first unless given.
            step: the optimiser's, from 0, for conditions that fade in; past that unless given.
        """
        config, data = self._config, self._data
        sizes = sizes or [0] * len(config.conditions)
        epoch, place = divmod(number, len(data))
        item = data.items[_order(config.seed, epoch, len(data))[place]]
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + 7 * number + 1)
        # Flow matching's shift of times; the same as adding its logarithm before the sigmoid.
        time = torch.sigmoid(torch.randn((), generator=generator) + math.log(config.time_shift))
        drop_text = torch.rand((), generator=generator) < config.drop_text_prob
        text = data.load(data.empty_text if drop_text else item.text)
        clean = pack(data.load(item.target)["latent"][None])[0]
        noise = torch.randn(clean.shape, generator=generator)
        ids, paint = self._ids, None
        conditions, condition_ids = [], []
        for index, condition in enumerate(config.conditions):
            drop_image = torch.rand((), generator=generator) < config.drop_image_prob
            own_ids = self._condition_ids[index][sizes[index]]
            if condition.integration:
                if item.paint is None:
                    paint = random_rectangle(*self._hw, generator)
                else:
                    paint = data.load(item.paint)["paint"]
                known = ~paint.flatten()
                conditions.append(clean[known])
                condition_ids.append(own_ids[known])
                continue
            tensors = data.load(item.conditions[index][epoch % condition.variants, sizes[index]])
            if config.references != "off" and drop_image:  # as a prompt without a reference
                conditions.append(clean[:0])
                condition_ids.append(own_ids[:0])
                continue
            black = data.load(data.black[index][sizes[index]])
            latent = (black if drop_image else tensors)["latent"]
            tokens, kept = pack(latent[None])[0], tensors.get("kept")
            shown = faded_in(condition, step)
            if shown < 1 and not drop_image:
                tokens = torch.lerp(clean, tokens, shown)
            if kept is not None:
                # A dropped image is black where it was: what image guidance evaluates.
                tokens, own_ids = tokens[kept.flatten()], own_ids[kept.flatten()]
            conditions.append(tokens)
            condition_ids.append(own_ids)
        if config.references != "off":
            shapes = [config.condition_sizes(i)[size] for i, size in enumerate(sizes)]
            condition_ids = _next_to_each_other(condition_ids, shapes)
        if paint is not None:
            rows = paint.flatten()
            clean, noise, ids = clean[rows], noise[rows], ids[rows]
        return Example(
            clean, noise, ids, time, text["features"], text["pooled"], conditions, condition_ids
        )

    def batch(self, numbers: Sequence[int], device: torch.device, step: int | None = None) -> Batch:
        """Several samples by their numbers, with conditions of one size each."""
        sizes = self._sizes(numbers[0])
        examples = [self.example(number, sizes, step) for number in numbers]
        return collate(examples, self._config, device)

    def _sizes(self, number: int) -> list[int]:
        """Which of its sizes each condition has in the batch that begins with this sample.

        One for all of them, since a batch of different sizes would be padded to the largest.
        """
        generator = torch.Generator().manual_seed(self._config.seed * 1_000_003 + 7 * number + 2)
        return [
            int(torch.randint(len(self._config.condition_sizes(index)), (), generator=generator))
            for index in range(len(self._config.conditions))
        ]


def faded_in(condition: ConditionConfig, step: int | None) -> float:
    """How much of a condition is shown at a step, the rest being the picture's own latent.

    A LoRA may learn to shut out tokens that it can't read yet and never look at them again. One
    that copies the picture first has its eyes open when the condition takes the picture's place.
    The first third of ``fade_steps`` shows the picture alone. Not in the original.
    """
    if step is None or step >= condition.fade_steps:
        return 1.0
    return max(0.0, (3 * step / condition.fade_steps - 1) / 2)


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
        refers = config.references != "off"
        conditions.append(
            ConditionTokens(
                tokens,
                own_ids,
                None if refers else adapter_name(index),
                config.references == "isolated" or condition.independent_condition,
                own_kept,
                refers,
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


def _with_index(positions: Tensor, index: int = 0) -> Tensor:
    """(n, 2) rows and columns -> (n, 3) position ids."""
    return F.pad(positions, (1, 0), value=index)


def _next_to_each_other(ids: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """References' position ids as FLUX.1 in ComfyUI lays several of them out.

    Each goes below or to the right of those before it, whichever leaves the whole less long.

    Args:
        sizes: of the references, width and height in pixels.
    """
    rows = columns = 0
    placed = []
    for own, (width, height) in zip(ids, sizes, strict=True):
        h, w = height // 16, width // 16
        down, right = (0, columns) if h + rows > w + columns else (rows, 0)
        placed.append(own + own.new_tensor([0, down, right]))
        rows, columns = max(rows, h + down), max(columns, w + right)
    return placed


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order

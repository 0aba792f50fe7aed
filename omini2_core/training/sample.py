"""Pictures drawn while training: plain Euler steps with the model as it is."""

from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..flux1.numbers import schedule_shift
from ..tokens.condition import unpack
from .batches import Batch, Drawer
from .branch import ConditionedFlux
from .config import TrainConfig
from .encode import EncodedData
from .encoders import Encoders


@torch.no_grad()
def sampled(model: ConditionedFlux, batch: Batch, steps: int, guidance: float) -> Tensor:
    """Draws pictures: (batch, n, 64) tokens.

    Args:
        batch: one without padding; its noise is the start and its time is not used.
    """
    sigmas = schedule(steps, batch.clean.shape[1], shifted=model.guidance_embeds)
    x = batch.noise
    for now, then in pairwise(sigmas):
        velocity = model(
            x,
            batch.text,
            batch.pooled,
            torch.full_like(batch.time, float(now)),
            batch.ids,
            batch.conditions,
            torch.full_like(batch.time, guidance),
        )
        x = x + float(then - now) * velocity.float()
    return x


def schedule(steps: int, tokens: int, shifted: bool) -> Tensor:
    """Noise levels from 1 to 0; FLUX.1-dev's are shifted for the number of picture tokens."""
    sigmas = torch.linspace(1, 0, steps + 1)
    if not shifted:
        return sigmas
    shift = torch.tensor(schedule_shift(tokens)).exp()
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def draw_samples(
    model: ConditionedFlux, config: TrainConfig, data: EncodedData, device: torch.device
) -> list[Tensor]:
    """Draws the first samples: for each, (n, 16, H/8, W/8) latents from left to right.

    Those are its conditions, the picture drawn and the target. Conditions that don't lie on the
    picture token by token are left out.
    """
    drawer = Drawer(config.model_copy(update={"drop_text_prob": 0.0, "drop_image_prob": 0.0}), data)
    width, height = config.target_size
    hw = height // 16, width // 16
    rows = []
    for number in range(min(config.samples.count, len(data))):
        batch = drawer.batch([number], device)
        drawn = sampled(model, batch, config.samples.steps, config.samples.guidance)
        tokens = [_whole(c.tokens, c.ids, hw) for c in batch.conditions if _on_grid(c.ids, hw)]
        target = _whole(batch.clean, batch.ids, hw)
        tokens += [_whole(drawn, batch.ids, hw), target]
        rows.append(unpack(torch.cat(tokens).cpu(), hw))
    return rows


def write_sheet(rows: list[Tensor], encoders: Encoders, path: Path) -> Path:
    """Writes a PNG of what :func:`draw_samples` gave, a row for each sample."""
    pictures = [encoders.decode_images(latents) for latents in rows]
    columns = min(len(row) for row in pictures)
    sheet = torch.cat([torch.cat(list(row[:columns]), 1) for row in pictures])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().numpy()).save(path)
    return path


def _on_grid(ids: Tensor, hw: tuple[int, int]) -> bool:
    """Whether a condition's tokens lie on the picture's own, so that it can be drawn in place."""
    limits = torch.tensor(hw, device=ids.device)
    places = ids[0, :, 1:]
    return bool(
        (places == places.round()).all() and (places >= 0).all() and (places < limits).all()
    )


def _whole(tokens: Tensor, ids: Tensor, hw: tuple[int, int]) -> Tensor:
    """(1, n, 64) tokens at their positions on the picture's grid, zeros elsewhere."""
    places = (ids[0, :, 1] * hw[1] + ids[0, :, 2]).long()
    full = tokens.new_zeros(1, hw[0] * hw[1], tokens.shape[-1])
    full[:, places] = tokens
    return full

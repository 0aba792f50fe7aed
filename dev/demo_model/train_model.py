"""Trains the demo model's transformer and text encoder from nothing on drawn scenes.

`python -m dev.demo_model.train_model`: first at 128x128, where a step is cheap, then at 256x256.
Needs the tokenizer and the VAE of `python -m dev.demo_model.make_model`. Latents and checkpoints
lie in .cache/demo-training/, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dev.demo_model import scenes
from dev.demo_model.make_model import DEMO_MODEL, DOUBLE_BLOCKS, HEAD, HIDDEN, SINGLE_BLOCKS, save
from dev.load import load_extension, load_host
from dev.paths import CACHE

WORK = CACHE / "demo-training"
DRAWN_AT_ONCE = 64
GUIDANCE = 1.0, 5.0  # that the model is told, and learns to ignore
SUBTOKENS = 4  # parts of a token's side that shapes are told for
SHAPE_LOSS = 0.3
SHIFT = 1.8  # how much more often noisy times are drawn than clean ones


def draw_pictures(job: tuple[int, int, int]) -> tuple[np.ndarray, list[str]]:
    """`count` scenes from `seed` on at `side`: (count, 3, side, side) bytes and their captions.

    Without torch, whose threads don't outlive the fork into another process.
    """
    seed, count, side = job
    drawn = [scenes.random_scene(Random(seed + i)) for i in range(count)]
    pictures = np.stack([scenes.draw(scene, side).picture for scene in drawn])
    return (
        np.round(pictures * 255).astype(np.uint8).transpose(0, 3, 1, 2),
        [s.caption for s in drawn],
    )


def encoded_scenes(count: int, side: int, seed: int, folder: Path) -> tuple[Tensor, list[str]]:
    """Latents in the model's space, packed (count, tokens, 64), and captions; kept on disk."""
    path = WORK / f"scenes-{side}-{count}-{seed}.pt"
    if path.is_file():
        return torch.load(path)
    from omini2_extension.omini2_core.demo import model as demo_model
    from omini2_extension.omini2_core.tokens.condition import pack

    demo_model.FOLDER = folder
    encoder = demo_model._load_vae().first_stage_model.taesd_encoder
    encoder = encoder.to(torch.bfloat16, memory_format=torch.channels_last)
    latents, captions = [], []
    jobs = [(seed + i, DRAWN_AT_ONCE, side) for i in range(0, count, DRAWN_AT_ONCE)]
    with ProcessPoolExecutor(1) as pool, torch.inference_mode():
        for pictures, words in pool.map(draw_pictures, jobs):
            pixels = (torch.from_numpy(pictures).to(torch.bfloat16) / 255).contiguous(
                memory_format=torch.channels_last
            )
            for part in pixels.split(8):
                latents.append(pack(encoder(part).contiguous()).half())
            captions += words
    found = torch.cat(latents), captions
    WORK.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    return found


def shape_labels(count: int, side: int, seed: int) -> Tensor:
    """(count, tokens, SUBTOKENS**2): which shape each part of each token shows; 0 is none."""
    grid = side // 16
    maps = [
        scenes.shape_map(scenes.random_scene(Random(seed + i)), grid * SUBTOKENS)
        for i in range(count)
    ]
    parts = torch.from_numpy(np.stack(maps)).view(count, grid, SUBTOKENS, grid, SUBTOKENS)
    return parts.permute(0, 1, 3, 2, 4).reshape(count, grid * grid, -1)


def tokens(captions: list[str], folder: Path) -> Tensor:
    """(captions, MAX_TOKENS) ids as the demo model's own tokenizer gives them."""
    from omini2_extension.omini2_core.demo import model as demo_model

    demo_model.FOLDER = folder
    tokenizer = demo_model.DemoTokenizer()
    ids = {
        text: [pair[0] for pair in tokenizer.tokenize_with_weights(text)["l"][0]]
        for text in set(captions)
    }
    return torch.tensor([ids[text] for text in captions])


class TextToPicture(nn.Module):
    """Text encoder and transformer as one, which is how they learn what words look like.

    While training, a head on the third block's picture tokens tells which shape is where. The
    features that it asks for are those that drawing needs (as REPA, arXiv 2410.06940, does with a
    pretrained encoder's), and the words find their way to the tokens much sooner. It isn't saved.
    """

    def __init__(self, seed: int) -> None:
        from diffusers import FluxTransformer2DModel
        from transformers import CLIPTextConfig, CLIPTextModel

        from omini2_extension.omini2_core.demo import model as demo_model
        from omini2_extension.omini2_core.flux1.numbers import rope_axes

        super().__init__()
        torch.manual_seed(seed)
        config, rows = dict(demo_model.TEXT_CONFIG), demo_model.vocabulary_size()
        self.text = CLIPTextModel(
            CLIPTextConfig(**config, vocab_size=rows, bos_token_id=demo_model.START_TOKEN)
        )
        width = config["hidden_size"]
        self.transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=DOUBLE_BLOCKS,
            num_single_layers=SINGLE_BLOCKS,
            attention_head_dim=HEAD,
            num_attention_heads=HIDDEN // HEAD,
            joint_attention_dim=width,
            pooled_projection_dim=width,
            guidance_embeds=True,
            axes_dims_rope=tuple(rope_axes(HEAD)),
        )
        self.head = nn.Sequential(
            nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, SUBTOKENS**2 * (1 + len(scenes.SHAPES)))
        )
        self.seen: Tensor | None = None
        self.transformer.single_transformer_blocks[0].register_forward_hook(self._look)
        for name, parameter in self.transformer.named_parameters():
            if ("norm" in name and "linear" in name) or name.startswith("proj_out"):
                nn.init.zeros_(parameter)  # every block starts as the identity (DiT)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)

    def _look(self, block: nn.Module, given: Any, got: tuple[Tensor, Tensor]) -> None:
        self.seen = got[1]

    def forward(self, x: Tensor, ids: Tensor, t: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity, and which shape is where.

        Args:
            x: (n, tokens, 64) noisy latents.
            ids: (n, words) of the captions.
            t: (n,) times, 0 to 1.

        Returns:
            (n, tokens, 64) and logits (n, tokens, SUBTOKENS**2, shapes).
        """
        encoded = self.text(input_ids=ids)
        side = int(x.shape[1] ** 0.5)
        line = torch.arange(side, dtype=torch.float32)
        positions = torch.cartesian_prod(torch.zeros(1), line, line)
        [velocity] = self.transformer(
            hidden_states=x,
            encoder_hidden_states=encoded.last_hidden_state,
            pooled_projections=encoded.pooler_output,
            timestep=t,
            guidance=guidance,
            img_ids=positions,
            txt_ids=torch.zeros(ids.shape[1], 3),
            return_dict=False,
        )
        shapes = self.head(self.seen).unflatten(-1, (SUBTOKENS**2, -1))
        return velocity, shapes

    def export(self, folder: Path) -> None:
        """Writes both as the host reads them."""
        import comfy.model_detection

        weights = {k: v.clone() for k, v in self.transformer.state_dict().items()}
        save(
            comfy.model_detection.convert_diffusers_mmdit(weights, ""),
            folder / "transformer.safetensors",
        )
        text = {k: v for k, v in self.text.state_dict().items() if "position_ids" not in k}
        if not next(iter(text)).startswith("text_model."):
            text = {f"text_model.{k}": v for k, v in text.items()}
        save(text, folder / "text_encoder.safetensors")


def optimizers(model: TextToPicture, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, which learn about twice as fast by it; Adam for the rest."""
    matrices, others = [], []
    for name, parameter in (*model.text.named_parameters(), *model.transformer.named_parameters()):
        (matrices if "blocks." in name and parameter.ndim == 2 else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw",
                         ns_steps=4),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True),
        torch.optim.AdamW(model.head.parameters(), lr=rate),
    ]  # fmt: skip


def noised(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, times and what lies between at them; noisier times more often than clean ones."""
    t = torch.sigmoid(torch.randn(len(latents)))
    t = SHIFT * t / (1 + (SHIFT - 1) * t)
    noise = torch.randn_like(latents)
    at = t[:, None, None]
    return noise, t, (1 - at) * latents + at * noise


def predicted(
    model: nn.Module, x: Tensor, ids: Tensor, t: Tensor, guidance: Tensor
) -> tuple[Tensor, Tensor]:
    """The model's velocity and shapes, computed in bfloat16."""
    # With so few tokens, plain products are faster than CPU's flash attention and its backward.
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        velocity, shapes = model(x, ids, t, guidance)
    return velocity.float(), shapes.float()


def loss_of(
    model: nn.Module, latents: Tensor, ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Flow matching's mean squared error, and the head's cross entropy."""
    noise, t, x = noised(latents)
    guidance = torch.empty(len(latents)).uniform_(*GUIDANCE)
    velocity, shapes = predicted(model, x, ids, t, guidance)
    weights = torch.ones(shapes.shape[-1])
    weights[0] = 0.3  # most of a scene is background
    told = F.cross_entropy(shapes.flatten(0, 2), labels.flatten().long(), weights)
    return F.mse_loss(velocity, noise - latents), told


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = TextToPicture(args.seed)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)
    )
    parts = optimizers(model, 1.0)
    checkpoint = WORK / "transformer.pt"
    step, seconds, curve = 0, 0.0, []
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(state["model"], strict=False)
        average.load_state_dict(state["average"], strict=False)
        for part, kept in zip(parts, state["optimizers"], strict=False):
            part.load_state_dict(kept)
        step, seconds, curve = state["step"], state["seconds"], state["curve"]
        torch.set_rng_state(state["rng"])
    fast = torch.compile(model, dynamic=False) if args.compile else model
    total = args.small_steps + args.large_steps
    data: dict[int, Any] = {}
    start, reported, losses = time.monotonic() - seconds, time.monotonic(), []
    while step < total:
        side, count, batch = (
            (128, args.small_scenes, args.batch)
            if step < args.small_steps
            else (256, args.large_scenes, args.batch // 2)
        )
        if side not in data:
            pause = time.monotonic()
            latents, captions = encoded_scenes(count, side, args.seed, args.output)
            labels = shape_labels(count, side, args.seed)
            data = {side: (latents, tokens(captions, args.output), labels)}
            empty = tokens([""], args.output)
            start += time.monotonic() - pause
        latents, ids, labels = data[side]
        chosen = torch.randint(len(latents), (batch,))
        words = torch.where(torch.rand(batch, 1) < 0.1, empty, ids[chosen])
        warm = min(1.0, (step + 1) / 100)
        left = (total - step) / (0.35 * total)  # falls over the last third
        for part in parts:
            for group in part.param_groups:
                group["lr"] = args.rate * warm * min(1.0, left)
        loss, told = loss_of(fast, latents[chosen].float(), words, labels[chosen])
        (loss + SHAPE_LOSS * told).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in parts:
            part.step()
            part.zero_grad(set_to_none=True)
        average.update_parameters(model)
        losses.append(loss.item())
        step += 1
        if step % 50 == 0 or step == total:
            seconds = time.monotonic() - start
            curve.append((step, side, sum(losses) / len(losses), round(seconds)))
            pace = len(losses) / (time.monotonic() - reported)
            print(
                f"step {step}: loss {curve[-1][2]:.4f}, shapes {told:.3f}, {pace:.2f} steps/s, "
                f"{seconds:.0f} s",
                flush=True,
            )
            reported, losses = time.monotonic(), []
        if step % 250 == 0 or step == total:
            state = {
                "model": model.state_dict(), "average": average.state_dict(),
                "optimizers": [part.state_dict() for part in parts], "step": step,
                "seconds": seconds, "curve": curve, "rng": torch.get_rng_state(),
            }  # fmt: skip
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            average.module.export(args.output)
    record(args, curve)


def record(args: argparse.Namespace, curve: list[tuple[int, int, float, int]]) -> None:
    """The settings and the loss curve, beside the weights."""
    folder = args.output / "training"
    folder.mkdir(exist_ok=True)
    with (folder / "transformer.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "side", "loss", "seconds"))
        writer.writerows((s, side, f"{loss:.4f}", seconds) for s, side, loss, seconds in curve)
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "compile")}
    (folder / "transformer.json").write_text(json.dumps(settings, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small-steps", type=int, default=6250, help="steps at 128x128")
    parser.add_argument("--large-steps", type=int, default=4500, help="steps at 256x256")
    parser.add_argument("--small-scenes", type=int, default=12288)
    parser.add_argument("--large-scenes", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=64, help="at 128x128; half of it at 256x256")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="faster where a compiler is at hand")
    parser.add_argument("--output", type=Path, default=DEMO_MODEL)
    args = parser.parse_args()
    load_host()
    load_extension()
    train(args)


if __name__ == "__main__":
    main()

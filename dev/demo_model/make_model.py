"""Makes the files in demo_model/ from nothing: `python -m dev.demo_model.make_model`.

The transformer and the text encoder are random here; the VAE is trained for `--steps` on drawn
shapes (no pictures from anywhere). The same arguments give the same files on the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import save as serialise
from torch import Tensor, nn

from dev.demo_model import scenes as scenes_
from dev.load import ROOT, load_extension, load_host

DEMO_MODEL = ROOT / "demo_model"
HIDDEN, HEAD, DOUBLE_BLOCKS, SINGLE_BLOCKS = 192, 64, 2, 4
START, END = "<|startoftext|>", "<|endoftext|>"


def save(weights: dict[str, Tensor], path: Path) -> None:
    """Write `weights` in half precision, which the host casts to what it computes in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {k: v.detach().half().contiguous() for k, v in weights.items()}
    path.write_bytes(serialise(halves))


def initialise(model: nn.Module, seed: int, gain: float = 1.0) -> None:
    """Normal weights by fan-in, biases 0, norms 1: the host's layers come uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=generator) * (gain / p[0].numel()) ** 0.5
        else:
            p.data = torch.zeros(p.shape) if name.endswith("bias") else torch.ones(p.shape)


def make_tokenizer(folder: Path, scenes: int = 4000) -> None:
    """CLIP's tokenizer with merges for the scenes' captions: each of their words is one token.

    Any other text falls apart into bytes, so any language fits.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    captions = []
    for seed in range(scenes):
        scene = scenes_.random_scene(Random(seed))
        captions += [scene.caption, scenes_.subject_caption(scene)]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=20, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), START, END]
    tokens += [left + right for left, right in merges]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 8192, **special}
    files = {
        "vocab.json": json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]),
        "special_tokens_map.json": json.dumps(special, indent=1),
        "tokenizer_config.json": json.dumps(config, indent=1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="utf-8", newline="\n")


def make_text_encoder(path: Path, seed: int) -> None:
    """A random text encoder of the shape that the extension expects."""
    from comfy import ops

    from omini2_extension.omini2_core.demo import model as demo_model

    model = demo_model.DemoTextModel(demo_model.TEXT_CONFIG, torch.float32, "cpu", ops.manual_cast)
    initialise(model, seed)
    save(model.state_dict(), path)


def make_transformer(path: Path, seed: int) -> None:
    """A random FLUX.1 with a guidance embedder, in the key format of the published files."""
    from comfy import ops
    from comfy.ldm.flux.model import Flux, FluxParams

    from omini2_extension.omini2_core.demo import model as demo_model
    from omini2_extension.omini2_core.flux1.numbers import rope_axes

    width = demo_model.TEXT_CONFIG["hidden_size"]
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    model = Flux(
        in_channels=16, out_channels=16, patch_size=2, vec_in_dim=width, context_in_dim=width,
        hidden_size=HIDDEN, num_heads=HIDDEN // HEAD, axes_dim=rope_axes(HEAD),
        depth=DOUBLE_BLOCKS, depth_single_blocks=SINGLE_BLOCKS, mlp_ratio=4.0, theta=10000,
        qkv_bias=True, guidance_embed=True, dtype=torch.float32, device="cpu",
        operations=ops.manual_cast, **newer,
    )  # fmt: skip
    initialise(model, seed)
    # Newer hosts call a norm's scale its weight, but read the scale of published files as well.
    save({k.replace("_norm.weight", "_norm.scale"): v for k, v in model.state_dict().items()}, path)


def draw(batch: int, side: int, generator: torch.Generator) -> Tensor:
    """(batch, 3, side, side) in 0 to 1: discs, rings, boxes, triangles, stripes on shading."""

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.rand(batch, channels, 1, 1, generator=generator) * (high - low) + low

    def colour() -> Tensor:
        # A power of a random number, so that greys, full colours and black all turn up.
        return uniform(0, 1, channels=3) ** uniform(0.3, 2)

    line = torch.linspace(-1, 1, side)
    y, x = line[:, None], line[None, :]
    angle = uniform(0, 2 * math.pi)
    shade = ((x * angle.cos() + y * angle.sin()) * 0.4 + 0.5).clamp(0, 1)
    image = colour() * shade + colour() * (1 - shade)
    for _ in range(7):
        angle, size = uniform(0, 2 * math.pi), uniform(0.05, 0.7)
        dx, dy = x - uniform(-1, 1), y - uniform(-1, 1)
        u = dx * angle.cos() + dy * angle.sin()
        v = (dy * angle.cos() - dx * angle.sin()) * uniform(1, 2.5)
        radius = (u * u + v * v).sqrt()
        distances = torch.stack((  # signed: below 0 inside the shape
            radius - size,
            (radius - size).abs() - 0.25 * size,
            torch.maximum(u.abs(), v.abs()) - size,
            torch.maximum(v, u.abs() * 0.87 - v * 0.5) - 0.5 * size,
            torch.maximum(radius - size, (u * 4 * math.pi / size).sin() * 0.1 * size),
        ))  # fmt: skip
        kind = torch.randint(len(distances), (batch,), generator=generator)
        distance = distances[kind, torch.arange(batch)]
        mask = (0.5 - distance * side / 2).clamp(0, 1) * uniform(0.6, 1.4).clamp(max=1)
        image = image * (1 - mask) + colour() * mask
    coarse = torch.randn(batch, 3, side // 8, side // 8, generator=generator)
    uneven = F.interpolate(coarse, size=(side, side), mode="bicubic")
    grain = torch.randn(batch, 1, side, side, generator=generator)
    return (image + uniform(-0.1, 0.1).clamp(min=0) * (uneven + 0.3 * grain)).clamp(0, 1)


def new_vae(seed: int) -> nn.Module:
    """TAESD with 16 channels: the one small VAE that stock loaders know."""
    from comfy.latent_formats import Flux as FluxLatents
    from comfy.taesd.taesd import TAESD

    vae = TAESD(latent_channels=FluxLatents.latent_channels)
    for coder in (vae.taesd_encoder, vae.taesd_decoder):
        initialise(coder, seed, gain=2.0)
        for block in coder:
            if hasattr(block, "fuse"):  # a residual block: starts near the identity
                block.conv[-1].weight.data *= 0.2
    # The encoder then gives, and the decoder takes, what the transformer works on: about N(0, 1).
    vae.vae_scale.data.fill_(FluxLatents().scale_factor)
    vae.vae_shift.data.fill_(FluxLatents().shift_factor)
    return vae


def vae_loss(images: Tensor, decoded: Tensor, z: Tensor) -> Tensor:
    """Pixels and edges as they were; latents as the sampler and the host's preview want them."""
    from comfy.latent_formats import Flux as FluxLatents

    error = decoded - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    spread = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
    latents = FluxLatents()
    seen = z.movedim(1, -1) @ torch.tensor(latents.latent_rgb_factors)
    seen = seen + torch.tensor(latents.latent_rgb_factors_bias)
    preview = F.mse_loss(seen, F.avg_pool2d(images, 8).movedim(1, -1) * 2 - 1)
    return error.abs().mean() + error.square().mean() + edges + 0.02 * (spread + preview)


def make_vae(path: Path, seed: int, steps: int, batch: int = 4, side: int = 64) -> None:
    """Train the VAE for `steps` (none: leave it random): 13 minutes at 4500 on one core."""
    vae = new_vae(seed).to(memory_format=torch.channels_last)
    parameters = [*vae.taesd_encoder.parameters(), *vae.taesd_decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, max(steps, 1), pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    start = time.monotonic()
    for step in range(steps):
        images = draw(batch, side, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.taesd_encoder(images)
            # Noise, because what a sampler hands to the decoder is never exact.
            noisy = z + 0.1 * torch.randn(z.shape, generator=generator)
            decoded = vae.taesd_decoder(noisy)
        loss = vae_loss(images, decoded.float(), z.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            psnr = -10 * F.mse_loss(decoded.detach().float(), images).log10()
            seconds = time.monotonic() - start
            print(f"step {step}: loss {loss:.3f}, {psnr:.1f} dB, {seconds:.0f} s", flush=True)
    save(vae.state_dict(), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("tokenizer", "text_encoder", "transformer", "vae")
    parser.add_argument("--only", choices=parts, nargs="+", default=parts)
    parser.add_argument("--steps", type=int, default=4500, help="training steps of the VAE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=DEMO_MODEL)
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would give other weights
    load_host()
    load_extension()
    make: dict[str, Callable[[], None]] = {
        "tokenizer": lambda: make_tokenizer(args.output / "tokenizer"),
        "text_encoder": lambda: make_text_encoder(
            args.output / "text_encoder.safetensors", args.seed
        ),
        "transformer": lambda: make_transformer(args.output / "transformer.safetensors", args.seed),
        "vae": lambda: make_vae(args.output / "vae.safetensors", args.seed, args.steps),
    }
    for part in args.only:
        make[part]()


if __name__ == "__main__":
    main()

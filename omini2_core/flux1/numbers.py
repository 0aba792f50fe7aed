"""FLUX.1's numbers, as published: sizes, positions, noise schedule."""

# The arguments of diffusers' FluxTransformer2DModel: double-stream blocks, then single-stream ones.
SHAPE = {
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}
BLOCKS = SHAPE["num_layers"] + SHAPE["num_single_layers"]
HIDDEN = SHAPE["num_attention_heads"] * SHAPE["attention_head_dim"]
KV_BYTES_PER_TOKEN = BLOCKS * 2 * HIDDEN * 2  # K and V in 16 bits
TOKEN_NUMBERS = 64  # of one token on its way in and out: 16 latent channels, 2x2
TEXT_TOKENS = 512  # of dev's text; schnell's is half as long
TIME_WAVES = 256  # sines and cosines that a time or a guidance is told in
# Where ComfyUI lets a block be replaced: these, each with the block's number in its kind.
SLOTS = "double_block", "single_block"

# FLUX.1-dev's schedule shift by number of picture tokens (original `calculate_shift`).
SHIFT_TOKENS = 256, 4096
SHIFT_VALUES = 0.5, 1.15


def rope_axes(head_dim: int) -> list[int]:
    """Shares of a head for (index, row, column): 16, 56 and 56 of 128."""
    return [head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16]


def schedule_shift(tokens: int) -> float:
    """FLUX.1-dev's schedule shift (mu) for this many picture tokens."""
    (t0, t1), (s0, s1) = SHIFT_TOKENS, SHIFT_VALUES
    return s0 + (s1 - s0) * (tokens - t0) / (t1 - t0)

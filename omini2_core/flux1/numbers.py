"""FLUX.1's numbers, as published: sizes, positions, noise schedule."""

BLOCKS = 19 + 38  # double-stream, then single-stream
HIDDEN = 3072
KV_BYTES_PER_TOKEN = BLOCKS * 2 * HIDDEN * 2  # K and V in 16 bits
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

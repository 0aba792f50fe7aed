"""How K/V lie in memory: number format, place, and the way back to where attention needs them.

``fp8`` is e4m3 with one scale per head (and per row, and for K and V each), the largest number
being mapped to e4m3's largest. Off the device, K/V lie in pinned memory, and each block's are
brought over while the block before it computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

STORAGE = ("model", "fp8")
KEEP_ON = ("auto", "gpu", "cpu")
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@dataclass(frozen=True)
class Storage:
    """What K/V are stored as, and where: ``format`` model or fp8, ``keep_on`` gpu or cpu.

    "gpu" is wherever the model computes.
    """

    format: str = "model"
    keep_on: str = "gpu"


@dataclass
class KeysValues:
    """K/V of one condition in one block of the model.

    Attributes:
        k, v: (rows, heads, tokens, head_dim), keys after RoPE.
        scales: of K and V, (rows, heads, 1, 1) in 32 bits each, if they are in fp8; a scale for
            each token, (rows, heads, tokens, 1), where tokens are stored anew one by one.
    """

    k: Tensor
    v: Tensor
    scales: tuple[Tensor, Tensor] | None = None

    @classmethod
    def room_for(cls, like: Tensor, storage: Storage, by_token: bool = False) -> "KeysValues":
        """Room to be filled with K/V of the shape and format of ``like``.

        Args:
            by_token: whether single tokens will be stored anew, see :meth:`replace`.
        """
        device = like.device if storage.keep_on == "gpu" else torch.device("cpu")
        pinned = device != like.device and like.device.type == "cuda"
        dtype = FP8 if storage.format == "fp8" else like.dtype

        def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.empty(tuple(shape), dtype=dtype, device=device, pin_memory=pinned)

        scales = None
        if storage.format == "fp8":
            heads = (*like.shape[:2], like.shape[2] if by_token else 1, 1)
            scales = empty(heads, torch.float32), empty(heads, torch.float32)
        return cls(empty(like.shape, dtype), empty(like.shape, dtype), scales)

    @property
    def tokens(self) -> int:
        """How many keys."""
        return self.k.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it."""
        return self.k, self.v, *(self.scales or ())

    @property
    def nbytes(self) -> int:
        """Bytes of K and V; the scales, 8 bytes a head, apart."""
        return self.k.nbytes + self.v.nbytes

    def rows(self, which: slice) -> "KeysValues":
        """Those of some rows; one row serves all."""
        if self.k.shape[0] == 1:
            return self
        scales = None if self.scales is None else (self.scales[0][which], self.scales[1][which])
        return KeysValues(self.k[which], self.v[which], scales)

    def keys(self, which: slice) -> "KeysValues":
        """Those of some tokens."""
        return KeysValues(self.k[:, :, which], self.v[:, :, which], self.scales)

    def alike(self, other: "KeysValues") -> bool:
        """Whether both have the same shape and format."""
        mine, theirs = self.tensors, other.tensors
        same = (
            a.shape == b.shape and a.dtype == b.dtype for a, b in zip(mine, theirs, strict=False)
        )
        return len(mine) == len(theirs) and all(same)

    def fits(self, like: Tensor, storage: Storage) -> bool:
        """Whether it is what :meth:`room_for` would give."""
        at_home = self.k.device == like.device
        return (
            self.k.shape == like.shape
            and (self.scales is not None) == (storage.format == "fp8")
            and (self.scales is not None or self.k.dtype == like.dtype)
            # Where the model computes on the CPU, both places are the same memory.
            and (at_home == (storage.keep_on == "gpu") or like.device.type == "cpu")
        )

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Stores K/V, (rows, heads, tokens, head_dim) each."""
        if self.scales is None:
            _copy(k, self.k)
            _copy(v, self.v)
            return
        for data, scale, x in zip((self.k, self.v), self.scales, (k, v), strict=True):
            by_token = x.shape[2] == scale.shape[2]
            step = _step(x, -1 if by_token else (-2, -1))
            _copy(step, scale)
            _copy(_in_fp8(x, step), data)

    def replace(self, which: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores some tokens' K/V anew, (rows, heads, len(which), head_dim) each."""
        which = which.to(self.k.device)
        for i, (data, x) in enumerate(((self.k, k), (self.v, v))):
            if self.scales is not None:
                step = _step(x, -1)
                self.scales[i].index_copy_(2, which, step.to(data.device))
                # Not every device copies fp8 by index.
                x, data = _in_fp8(x, step).view(torch.uint8), data.view(torch.uint8)
            data.index_copy_(2, which, x.to(data.device))

    def write(self, k: Tensor, v: Tensor) -> None:
        """Fills places (n, heads, tokens, head_dim) in attention's format.

        One row serves all n, and one head as many as share it.
        """
        kept, scales = (self.k, self.v), self.scales
        if k.shape[1] != self.k.shape[1]:
            k, v = (t.unflatten(1, (self.k.shape[1], -1)) for t in (k, v))
            kept = self.k[:, :, None], self.v[:, :, None]
            scales = None if scales is None else (scales[0][:, :, None], scales[1][:, :, None])
        for place, t, scale in zip((k, v), kept, scales or (None, None), strict=True):
            place.copy_(t)
            if scale is not None:
                place.mul_(scale)  # at once, while a GPU's cache still holds it

    def decoded(self, dtype: torch.dtype) -> "KeysValues":
        """A copy in the model's format."""
        k, v = (torch.empty_like(t, dtype=dtype) for t in (self.k, self.v))
        self.write(k, v)
        return KeysValues(k, v)

    def stored_as(
        self, storage: Storage, device: torch.device, by_token: bool = False
    ) -> "KeysValues":
        """The same K/V stored otherwise; itself if they are so already.

        What is in fp8 stays so: the way back would bring nothing.

        Args:
            device: the model's.
        """
        here = self
        if storage.format == "fp8" and self.scales is None:
            here = KeysValues.room_for(self.k, replace(storage, keep_on="gpu"), by_token)
            here.fill(self.k, self.v)
        target = device if storage.keep_on == "gpu" else torch.device("cpu")
        pinned = target != device and device.type == "cuda"
        if here.k.device == target and (not pinned or here.k.is_pinned()):
            return here
        return here.room_on(target, pinned).copy(here)

    def room_on(self, device: torch.device, pinned: bool = False) -> "KeysValues":
        """Room for the same on a device, to be filled by :meth:`copy`."""

        def room(t: Tensor) -> Tensor:
            return torch.empty(t.shape, dtype=t.dtype, device=device, pin_memory=pinned)

        scales = None if self.scales is None else (room(self.scales[0]), room(self.scales[1]))
        return KeysValues(room(self.k), room(self.v), scales)

    def copy(self, other: "KeysValues") -> "KeysValues":
        """Takes over what is stored just so elsewhere; pinned memory makes nobody wait."""
        for source, target in zip(other.tensors, self.tensors, strict=True):
            _copy(source, target)
        return self


def _step(x: Tensor, over: int | tuple[int, int]) -> Tensor:
    """What one step of e4m3's largest number stands for, over the last dimension or two."""
    largest = x.abs().amax(over, keepdim=True).float()
    return (largest / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)


def _in_fp8(x: Tensor, step: Tensor) -> Tensor:
    # Rounding can pass the largest number that e4m3 has, which would make it NaN.
    return (x / step).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def _copy(source: Tensor, target: Tensor) -> Tensor:
    """Copies; between a GPU and pinned memory without waiting, which other devices get wrong."""
    gpu = "cuda" in (source.device.type, target.device.type)
    return target.copy_(source, non_blocking=gpu)


@dataclass
class Entry:
    """The K/V of one condition for one chunk: a :class:`KeysValues` for each block of the model.

    Their memory is allocated once and filled again at each refresh.

    Attributes:
        count: how many blocks the model has.
        filled: the blocks with K/V of the latest refresh.
        step: of the schedule, when that was.
        refreshes: how often it was computed.
        by_token: whether single tokens are stored anew between two refreshes.
    """

    count: int
    blocks: dict[int, KeysValues] = field(default_factory=dict)
    filled: set[int] = field(default_factory=set)
    step: int = -1
    refreshes: int = 0
    by_token: bool = False

    @property
    def format(self) -> str:
        """The number format, one of ``STORAGE``."""
        return "model" if all(kv.scales is None for kv in self.blocks.values()) else "fp8"

    @property
    def complete(self) -> bool:
        """Whether all blocks hold K/V; an error can leave an entry incomplete."""
        return len(self.filled) == self.count

    def restart(self) -> None:
        """Begins a refresh."""
        self.filled.clear()
        self.refreshes += 1

    def store(self, number: int, k: Tensor, v: Tensor, storage: Storage) -> None:
        """Stores the K/V of a block, (rows, heads, tokens, head_dim) each."""
        keys_values = self.blocks.get(number)
        if keys_values is None or not keys_values.fits(k, storage):
            keys_values = self.blocks[number] = KeysValues.room_for(k, storage, self.by_token)
        keys_values.fill(k, v)
        self.filled.add(number)

    def adopt(self, other: "Entry") -> None:
        """Takes over what another entry holds, so that it need not be computed."""
        self.blocks, self.filled = other.blocks, other.filled

    def rearrange(self, storage: Storage, device: torch.device) -> None:
        """Stores what it holds otherwise, block by block so that memory doesn't double."""
        for number, keys_values in self.blocks.items():
            self.blocks[number] = keys_values.stored_as(storage, device, self.by_token)

    @property
    def nbytes(self) -> int:
        """Bytes that the K/V take."""
        return sum(keys_values.nbytes for keys_values in self.blocks.values())

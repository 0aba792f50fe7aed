"""ComfyUI's dynamic VRAM on a pretended card: what its native library does of it.

Weights lie in pages of a range of addresses, in the order in which they are to stay. A page gets
memory when a layer asks for its weights. Where the card is full it is taken from the last pages,
and what lay there isn't kept on the card any more, but copied at every use. After the library's
description (comfy-aimdo 0.4.13); the fragments that PyTorch's own allocator leaves aren't here, and
weights are not pinned in the computer's memory.
"""

import math
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.simulate.device import Gpu

PAGE, GROWTH = 32 << 20, 16 << 20  # bytes at once, of weights and of buffers
HEADROOM, BESIDE = 256 << 20, 128 << 20  # left free, and more of it where PyTorch asks
Place = tuple[Any, int, int]  # who has it, from which byte on, how many


class Pages:
    """A model's range of addresses."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        self._gpu = gpu
        self._count = self._mark = min(math.ceil(size / PAGE), gpu.card.total // PAGE)
        self._pins: dict[int, int] = {}  # of the pages that have memory
        self._times: Counter[int] = Counter()  # that a page was given memory
        self._offset = 0

    def prioritize(self) -> None:
        """All of it may be on the card again."""
        self._mark = self._count

    def alloc(self, n: int) -> Place:
        """Addresses."""
        place = self, -(-self._offset // 512) * 512, n
        self._offset = place[1] + n
        return place

    def fault(self, start: int, n: int) -> Any:
        """Memory behind addresses, until they are unpinned; None where there is none.

        Returns:
            the same as last time if what was written there is there still.
        """
        pages = range(start // PAGE, math.ceil((start + n) / PAGE))
        missing = [page for page in pages if page not in self._pins]
        if missing and pages.stop <= self._mark:
            self.free_memory(len(missing) * PAGE + HEADROOM - self._gpu.free)
        if pages.stop > self._mark:
            return None
        for page in pages:
            if page not in self._pins:
                self._pins[page] = 0
                self._times[page] += 1
                self._gpu.take(PAGE)
            self._pins[page] += 1
        return array("I", [self._times[page] for page in pages])

    def unpin(self, start: int, n: int) -> None:
        """The weights there have been used."""
        for page in range(start // PAGE, math.ceil((start + n) / PAGE)):
            if page in self._pins:
                self._pins[page] = max(0, self._pins[page] - 1)
                if page >= self._mark:
                    self._drop(page)

    def free_memory(self, n: float) -> int:
        """Lets go of so many bytes, from the end."""
        freed = 0
        while freed < n and self._mark:
            self._mark -= 1
            freed += self._drop(self._mark)
        return freed

    def loaded_size(self) -> int:
        """Bytes that are on the card."""
        return len(self._pins) * PAGE

    def _drop(self, page: int) -> int:
        if self._pins.get(page, 1):
            return 0
        del self._pins[page]
        self._gpu.take(-PAGE)
        return PAGE

    def __del__(self) -> None:
        self._gpu.take(-self.loaded_size())


class Buffer:
    """What weights that aren't kept are copied to."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._size = gpu, 0

    def size(self) -> int:
        """Bytes."""
        return self._size

    def get(self, n: int, offset: int = 0) -> Place:
        """A part of it, which grows for that."""
        grown = max(self._size, math.ceil((offset + n) / GROWTH) * GROWTH)
        self._gpu.before(grown - self._size)
        self._gpu.take(grown - self._size)
        self._size = grown
        return self, offset, n

    def __del__(self) -> None:
        self._gpu.take(-self._size)


class NoPins:
    """Pinned memory for weights, which isn't to be had."""

    size = 0

    def extend(self, **asked: Any) -> None:
        """The host goes on without."""
        raise RuntimeError("no pinned memory")


def pretend(gpu: Gpu) -> None:
    """The host has dynamic VRAM from here on."""
    import comfy.memory_management
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    import comfy_aimdo.vram_buffer

    models: list[Pages] = []

    def pages(size: int, device: int) -> Pages:
        models.append(Pages(gpu, size))
        return models[-1]

    def give_way(n: int) -> None:
        for each in models:
            each.free_memory(n + BESIDE + HEADROOM - gpu.free)

    def tensor(place: Place, device: torch.device) -> Tensor:
        return gpu.placed(place[2])

    gpu.before = give_way
    comfy_aimdo.model_vbar.ModelVBAR = pages
    comfy_aimdo.model_vbar.vbars_analyze = lambda device=None: sum(m.loaded_size() for m in models)
    comfy_aimdo.torch.aimdo_to_tensor = tensor
    comfy_aimdo.vram_buffer.VRAMBuffer = lambda size, device: Buffer(gpu)
    comfy_aimdo.host_buffer.HostBuffer = lambda *size: NoPins()
    comfy.memory_management.aimdo_enabled = True


@contextmanager
def off() -> Iterator[None]:
    """A model is made with its weights; with dynamic VRAM they wait for a file."""
    import comfy.memory_management

    with mock.patch.object(comfy.memory_management, "aimdo_enabled", False):
        yield

"""Graphics cards, as far as they are pretended."""

from collections.abc import Iterable
from dataclasses import dataclass, field

GIB = 2**30
# Shares of what the data sheets promise that a kernel is taken to reach.
PRODUCTS, ATTENTION, MEMORY = 0.7, 0.5, 0.85


@dataclass(frozen=True)
class Card:
    """A card by its data sheet.

    Attributes:
        gib: of memory; makers count GB as GiB here.
        capability: CUDA's compute capability.
        flops: a second, of dense 16-bit products summed in 32 bits.
        bandwidth: bytes of its memory a second.
        taken: GiB that the driver and a desktop have.
    """

    name: str
    gib: int
    capability: tuple[int, int]
    flops: float
    bandwidth: float
    taken: float = 0.6

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return self.gib * GIB

    @property
    def usable(self) -> int:
        """Bytes that are not the driver's."""
        return int((self.gib - self.taken) * GIB)

    def seconds(self, kernels: Iterable["Kernel"]) -> float:
        """Each kernel takes as long as the slower of its arithmetic and its memory traffic."""
        return sum(
            max(
                each.flops / (self.flops * (ATTENTION if each.attention else PRODUCTS)),
                each.bytes / (self.bandwidth * MEMORY),
            )
            for each in kernels
        )


CARDS = {
    "12": Card("NVIDIA GeForce RTX 3060", 12, (8, 6), 25.5e12, 0.36e12),
    "16": Card("NVIDIA GeForce RTX 4080", 16, (8, 9), 97.5e12, 0.717e12),
    "24": Card("NVIDIA GeForce RTX 4090", 24, (8, 9), 165.2e12, 1.008e12),
    "80": Card("NVIDIA H100 80GB HBM3", 80, (9, 0), 989e12, 3.35e12),
}


@dataclass(frozen=True)
class Kernel:
    """One launch."""

    flops: int
    bytes: int
    attention: bool


@dataclass(frozen=True)
class Wait:
    """The processor waiting for the device."""

    why: str
    bytes: int
    where: str

    def __str__(self) -> str:
        return f"{self.why} ({self.bytes} bytes) at {self.where}"


@dataclass
class Tally:
    """What happened in a stretch of work.

    Attributes:
        base, peak: bytes on the device when it began, and at most.
        peak_at: where that was.
        to_device, from_device: bytes copied between the two memories.
        allocations: how often memory was taken on the device.
    """

    base: int
    peak: int
    peak_at: str = ""
    to_device: int = 0
    from_device: int = 0
    allocations: int = 0
    waits: list[Wait] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)

    @property
    def flops(self) -> int:
        """Of all products and attention."""
        return sum(each.flops for each in self.kernels)

    @property
    def bytes(self) -> int:
        """Read and written in the device's memory."""
        return sum(each.bytes for each in self.kernels)

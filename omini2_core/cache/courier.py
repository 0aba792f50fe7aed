"""K/V on their way from pinned memory to where the model computes."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from .entry import Entry, KeysValues

SLOTS = 2  # blocks whose K/V are on the device: that of the one that computes, and the next one's


class Courier:
    """Brings K/V from pinned memory to where the model computes, a block ahead of it.

    On a GPU the copies run on a stream of their own, beside the computation; elsewhere they are
    plain copies at the same places. They go to room that is taken once: what PyTorch frees for
    another stream comes back only when the GPU is there, while Python runs blocks ahead of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._rooms: list[list[KeysValues]] = [[] for _ in range(SLOTS)]
        self._ahead: dict[int, dict[int, KeysValues]] = {}

    def send(self, number: int, entries: Sequence[Entry]) -> None:
        """Starts copying what these entries hold of a block; the one before the last is over."""
        stored = [entry.blocks[number] for entry in entries]
        rooms = self._rooms[number % SLOTS] = self._room(self._rooms[number % SLOTS], stored)
        if self._stream is not None:
            # The block that had this room has been queued, and K/V may have been stored a moment
            # ago, both by the stream that computes.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            pairs = zip(entries, rooms, stored, strict=True)
            self._ahead[number] = {id(entry): room.copy(kv) for entry, room, kv in pairs}

    def _room(self, had: list[KeysValues], stored: Sequence[KeysValues]) -> list[KeysValues]:
        """Room for K/V, that which is there already if it fits."""
        if len(had) == len(stored) and all(map(KeysValues.alike, had, stored)):
            return had
        had.clear()  # before there is more
        return [kv.room_on(self._device) for kv in stored]

    def receive(self, number: int) -> dict[int, KeysValues]:
        """The copies by the identity of their entries, once they have arrived."""
        arrived = self._ahead.pop(number, {})
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return arrived

    def drop(self) -> None:
        """Gives up what has not been received."""
        if self._ahead and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._ahead.clear()

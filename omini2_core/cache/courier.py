"""K/V on their way from pinned memory to where the model computes."""

from collections.abc import Sequence

import torch

from .entry import Entry, KeysValues


class Courier:
    """Brings K/V from pinned memory to where the model computes, a block ahead of it.

    On a GPU the copies run on a stream of their own, beside the computation; elsewhere they are
    plain copies at the same places.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: dict[int, dict[int, KeysValues]] = {}

    def send(self, number: int, entries: Sequence[Entry]) -> None:
        """Starts copying what these entries hold of a block."""
        there = {id(entry): entry.blocks[number] for entry in entries}
        if self._stream is None:
            self._ahead[number] = {key: kv.copied_to(self._device) for key, kv in there.items()}
            return
        # K/V may have been stored a moment ago, by the stream that computes.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._ahead[number] = {key: kv.copied_to(self._device) for key, kv in there.items()}

    def receive(self, number: int) -> dict[int, KeysValues]:
        """The copies by the identity of their entries, once they have arrived."""
        arrived = self._ahead.pop(number, {})
        if self._stream is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            for keys_values in arrived.values():
                for tensor in keys_values.tensors:
                    tensor.record_stream(computing)
        return arrived

    def drop(self) -> None:
        """Gives up what has not been received."""
        self._ahead.clear()

"""What is said where a device runs out of memory and nothing is left to move off it.

Whoever asks for the last bytes is seldom the one to blame, so it is said of the model's own
computation as well. It stays the kind of error for which the host unloads all models.
"""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch

from .versions import is_out_of_memory

Ways = Mapping[str, str]  # a node's input -> what to do about it
ELSEWHERE = {"keep_on": "set keep_on to cpu in Condition Cache"}
CONDITIONS = {"compression": "make the conditions smaller with Compact Tokens"}
REFERENCES = {"image": "connect fewer or smaller references"}
PICTURE = {"width": "choose a smaller width and height"}


class TakesMemory(Protocol):
    """What takes memory beside the model."""

    @property
    def ways_out(self) -> Ways:
        """What there is to do about it."""


@contextmanager
def said(*takers: TakesMemory) -> Iterator[None]:
    """Names the ways out where the device runs out of memory."""
    try:
        yield
    except Exception as error:
        if not takers or not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which hold what the evaluation has made
        ways: dict[str, str] = {}
        for each in takers:
            ways |= each.ways_out
        raise torch.OutOfMemoryError(sentence(ways)) from error


def sentence(ways: Ways) -> str:
    """The first way's input, and all ways."""
    *others, last = ways.values()
    told = f"{', '.join(others)} or {last}" if others else last
    return f"{next(iter(ways))}: the device ran out of memory; {told}."

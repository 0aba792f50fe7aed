"""What reads foreign input, each with inputs for it and what it may answer.

A parser may give a result, or refuse with one of our own sentences. Everything else is a finding:
another exception, a sentence that nobody can read, a result that isn't finite.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from dev.quality.fuzz import inputs, workflows
from dev.quality.fuzz.model import FIT, cache_file, easycontrol_file, ominicontrol_file, targets
from dev.quality.fuzz.safetensors import File, mutated
from dev.quality.fuzz.workflows import encode
from omini2_extension import nodes
from omini2_extension.omini2_core.cache import file as saved_file
from omini2_extension.omini2_core.cache.policy import CachePolicy
from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.host.folders import read_header
from omini2_extension.omini2_core.host.setup import Branch, SavedBranch, Setup
from omini2_extension.omini2_core.lora.family import OMINICONTROL, PLACEMENT_CHOICES
from omini2_extension.omini2_core.lora.file import BranchLora, load_lora
from omini2_extension.omini2_core.lora.recognise import answer as answer_of
from omini2_extension.omini2_core.lora.recognise import recognise
from omini2_extension.omini2_core.tokens.condition import Condition, Placement

USED, REFUSED = "used", "refused"
LONGEST = 1500  # letters of a sentence
MEMORY = Path("/dev/shm")


class Finding(AssertionError):
    """An input that gave something else than a result or one of our sentences."""


@dataclass(frozen=True)
class Parser:
    """One way into the extension.

    Attributes:
        name: what `python -m dev.quality.fuzz` calls it.
        draw: makes an input.
        read: gives the input to the extension; its result is checked in there.
        is_file: whether the input is a file's bytes.
    """

    name: str
    draw: Callable[[Random], Any]
    read: Callable[[Any], None]
    is_file: bool = False

    def run(self, rng: Random) -> str:
        """USED or REFUSED.

        Raises:
            Finding: neither.
        """
        return self.check(self.draw(rng))

    def check(self, given: Any) -> str:
        """As :meth:`run`, for a given input."""
        try:
            self.read(given)
        except Omini2Error as error:
            text = str(error)
            readable = len(text) <= LONGEST and all(c.isprintable() for c in text)
            if not readable or not text.endswith("."):
                raise Finding(f"no sentence: {text[:LONGEST]!r}") from error
            return REFUSED
        except Finding:
            raise
        except Exception as error:
            raise Finding(f"{type(error).__name__}: {error}"[:LONGEST]) from error
        return USED


# --- files ---------------------------------------------------------------------------------------


def _files(*contents: bytes) -> Callable[[Random], bytes]:
    real = [File.read(content) for content in contents]
    return lambda rng: mutated(rng, rng.choice(real))


KEYS = [f"transformer.x_embedder.lora_{part}.weight" for part in "AB"]


class _Scratch:
    """One file in memory that is written anew for each input."""

    def __init__(self) -> None:
        folder = MEMORY if MEMORY.is_dir() else None
        self._folder = tempfile.TemporaryDirectory(prefix="omini2_fuzz", dir=folder)
        self.path = Path(self._folder.name) / "canny.safetensors"

    def holding(self, content: bytes) -> Path:
        with suppress(FileNotFoundError):  # never over a file that may still be mapped
            os.unlink(self.path)
        self.path.write_bytes(content)
        return self.path


_scratch = _Scratch()


def _read_lora(content: bytes) -> None:
    lora = load_lora(_scratch.holding(content), *targets())
    for items in lora.deltas.values():
        for delta in items:
            finite = (
                torch.isfinite(delta.up.float()).all() and torch.isfinite(delta.down.float()).all()
            )
            if not finite or not math.isfinite(delta.scale):
                raise Finding("a delta that isn't finite")
    keys, metadata = read_header(_scratch.path)
    recognise("canny.safetensors", keys, metadata).warn_about(_condition(Random(0)), "auto")


def _read_preset(content: bytes) -> None:
    keys, metadata = read_header(_scratch.holding(content))
    _answer("canny.safetensors", keys, metadata)


def _read_cache(content: bytes) -> None:
    read = saved_file.load(_scratch.holding(content), FIT)
    for entry in read.entries.values():
        for block in entry.blocks.values():
            if not all(torch.isfinite(part.float()).all() for part in block.tensors):
                raise Finding("K/V that aren't finite")


# --- metadata ------------------------------------------------------------------------------------


def _draw_metadata(rng: Random) -> tuple[dict[str, str], Condition, str]:
    return inputs.metadata(rng), _condition(rng), rng.choice(("auto", "joint", "independent"))


def _read_metadata(given: tuple[dict[str, str], Condition, str]) -> None:
    metadata, condition, attention = given
    lora = BranchLora("x.safetensors", {}, metadata, OMINICONTROL)
    recognise("x.safetensors", KEYS, metadata).warn_about(condition, attention)
    Branch(condition, lora)
    for base in (None, "dev", "x"):
        _answer("x.safetensors", KEYS, metadata, base)


def _answer(
    name: str, keys: list[str], metadata: Mapping[str, str], base: str | None = None
) -> None:
    answer = answer_of(name, keys, metadata, base)
    text = json.dumps(answer, allow_nan=False)  # the editor's JSON knows no NaN
    if len(text) > 10 * LONGEST:
        raise Finding(f"an answer of {len(text)} letters")


def _condition(rng: Random) -> Condition:
    h, w = rng.choice(((4, 6), (6, 6), (1, 1)))
    kind = rng.choice(("aligned", "fit", "left", "custom"))
    place = Placement(kind, (0.0, float(rng.randrange(-4, 4))), (rng.choice((1.0, 2.0)),) * 2)
    latent = torch.zeros(1, 16, 2 * h, 2 * w)
    return Condition(latent, latent, latent, encode, (16 * h, 16 * w), place)


# --- what comes through nodes --------------------------------------------------------------------


class _Vae:
    encode = staticmethod(encode)


def _bounds() -> dict[str, dict[str, tuple[float, float, float]]]:
    """Node -> its numeric inputs -> lowest, highest and default."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for node in nodes.NODES:
        schema = node.define_schema()
        found[schema.node_id] = {
            i.id: (i.min, i.max, i.default)
            for i in schema.inputs
            if hasattr(i, "min") and isinstance(i.default, int | float)
        }
    return found


BOUNDS = _bounds()


def _draw_encode(rng: Random, image: Any = None, mask: Any = None) -> dict[str, Any]:
    numbers = BOUNDS["Omini2ConditionEncode"]
    wild = image is None and mask is None
    values = {
        name: inputs.number(rng, *bounds) if wild else bounds[2] for name, bounds in numbers.items()
    }
    if wild and isinstance(values["size"], int) and 1024 < values["size"] <= 16384:
        values["size"] = 1024  # what it costs is known
    return {
        "image": torch.rand(1, 32, 48, 3) if image is None else image,
        "mask": mask,
        "placement": rng.choice([*PLACEMENT_CHOICES, "x"] if wild else PLACEMENT_CHOICES),
        "resize": rng.choice(("off", "off", "stretch", "pad")),
        **values,
        **({} if wild else {"size": 64}),
    }


def _draw_compact(rng: Random, mask: Any = None) -> dict[str, Any]:
    numbers = BOUNDS["Omini2CompactTokens"]
    wild = mask is None
    return {
        **{n: inputs.number(rng, *b) if wild else b[2] for n, b in numbers.items()},
        "position_correcting": rng.random() < 0.5,
        "prune": rng.choice(("off", "empty", "mask", "x" if wild else "mask")),
        "token_integration": rng.random() < 0.3,
        "mask": torch.rand(1, 32, 48) if wild else mask,
        "shift_schedule": rng.random() < 0.5,
    }


def _run_nodes(given: tuple[dict[str, Any], dict[str, Any]]) -> None:
    encode, compact = given
    condition = nodes.ConditionEncode.execute(vae=_Vae(), **encode)[0]
    _require_finite(condition)
    condition, drawn, count = nodes.CompactTokens.execute(condition, **compact).args
    _require_finite(condition)
    if not torch.isfinite(drawn).all() or not 0 <= count <= math.prod(condition.hw):
        raise Finding("a picture of tokens that isn't one")


def _require_finite(condition: Condition) -> None:
    parts = condition.latent, condition.empty, condition.positions((4, 4))
    empty = not condition.token_count and condition.paint is None  # all may be painted
    if empty or not all(torch.isfinite(part).all() for part in parts):
        raise Finding("a condition that isn't finite, or is empty")


def _draw_rest(rng: Random) -> dict[str, dict[str, Any]]:
    rest = ("Omini2ApplyLoRA", "Omini2ConditionCache", "Omini2ImageGuidance", "Omini2LoadCache")
    return {
        name: {key: inputs.number(rng, *bounds) for key, bounds in BOUNDS[name].items()}
        for name in rest
    }


def _run_rest(given: dict[str, dict[str, Any]]) -> None:
    """The inputs that end in a setup; the model is asked for nothing else."""
    apply = given["Omini2ApplyLoRA"]
    branch = Branch(_condition(Random(0)), BranchLora("x", {}, {}, OMINICONTROL), **apply)
    setup = Setup((branch,), **given["Omini2ImageGuidance"])
    policy = CachePolicy("auto", **given["Omini2ConditionCache"])
    values = (policy.refresh_every, setup.image_guidance_scale, branch.strength)
    if not all(abs(value) <= 1e6 for value in values):
        raise Finding("a setting that isn't finite")
    SavedBranch(None, **given["Omini2LoadCache"])


def _draw_image(rng: Random) -> tuple[Any, Any]:
    return _draw_encode(rng, inputs.image(rng)), _draw_compact(rng, torch.ones(1, 8, 8))


def _draw_mask(rng: Random) -> tuple[Any, Any]:
    first = rng.choice((None, inputs.mask(rng)))
    return _draw_encode(rng, torch.rand(1, 32, 48, 3), first), _draw_compact(rng, inputs.mask(rng))


def _draw_numbers(rng: Random) -> tuple[Any, Any]:
    return (_draw_encode(rng), _draw_compact(rng)), _draw_rest(rng)


def _run_numbers(given: tuple[Any, Any]) -> None:
    _run_rest(given[1])
    _run_nodes(given[0])


PARSERS = {
    parser.name: parser
    for parser in (
        Parser("lora", _files(ominicontrol_file()), _read_lora, is_file=True),
        Parser("easycontrol", _files(easycontrol_file()), _read_lora, is_file=True),
        Parser("cache", _files(cache_file(False), cache_file(True)), _read_cache, is_file=True),
        Parser(
            "preset", _files(ominicontrol_file(), easycontrol_file()), _read_preset, is_file=True
        ),
        Parser("metadata", _draw_metadata, _read_metadata),
        Parser("image", _draw_image, _run_nodes),
        Parser("mask", _draw_mask, _run_nodes),
        Parser("numbers", _draw_numbers, _run_numbers),
        Parser("workflow", workflows.draw, workflows.read),
    )
}

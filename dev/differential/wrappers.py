"""Unet function wrappers as extensions have them: they regroup the rows of a batch.

A plan says which rows go together into each call of the model, and what the call says of them.
Whatever it is, a row's result is the model's for that row, so the picture is the same.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Rows = Sequence[int]


@dataclass(frozen=True)
class Call:
    """One call of the model: the batch's rows that it gets, and the names that it gives them.

    Attributes:
        names: positions in the host's list of names; None leaves the list out, () the list as it
            was, whatever the rows are.
    """

    rows: Rows
    names: Rows | None = ()


Plan = Callable[[int, int], Sequence[Call]]  # (pictures, prompts) -> calls


def rows_of(value: Any, rows: Rows, batch: int) -> Any:
    """The rows of everything in a wrapper's arguments that has a batch."""
    if isinstance(value, Tensor):
        return value[list(rows)] if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {key: rows_of(each, rows, batch) for key, each in value.items()}
    if isinstance(value, list):
        return [rows_of(each, rows, batch) for each in value]
    return value


def wrapper(plan: Plan, fresh: bool = False) -> Callable[[Any, dict[str, Any]], Tensor]:
    """A function for ``set_model_unet_function_wrapper``.

    Args:
        fresh: whether every call's names are new ones.
    """

    def regroup(apply_model: Any, args: dict[str, Any]) -> Tensor:
        x, t, c = args["input"], args["timestep"], dict(args["c"])
        options = c.pop("transformer_options")
        prompts = len(args["cond_or_uncond"])
        out: dict[int, Tensor] = {}
        for call in plan(len(x) // prompts, prompts):
            given = rows_of(c, call.rows, len(x))
            renamed = _renamed(options, call.names, fresh)
            rows = list(call.rows)
            got = apply_model(x[rows], t[rows], transformer_options=renamed, **given)
            for i, row in enumerate(rows):
                out.setdefault(row, got[i])
        return torch.stack([out[i] for i in range(len(x))])

    return regroup


def _renamed(options: dict[str, Any], names: Rows | None, fresh: bool) -> dict[str, Any]:
    options = dict(options)
    for key in ("uuids", "cond_or_uncond"):
        if names is None:
            options.pop(key, None)
        elif len(names):
            options[key] = [options[key][i] for i in names]
    if fresh and "uuids" in options:
        options["uuids"] = [uuid.uuid4() for _ in options["uuids"]]
    return options


def _chunk(i: int, n: int) -> Rows:
    return range(i * n, (i + 1) * n)


PLANS: dict[str, Plan] = {
    "as it is": lambda n, k: [Call(range(n * k))],
    "prompt by prompt": lambda n, k: [Call(_chunk(i, n)) for i in range(k)],
    "prompt by prompt, named": lambda n, k: [Call(_chunk(i, n), (i,)) for i in range(k)],
    "last prompt first": lambda n, k: [Call(_chunk(i, n), (i,)) for i in reversed(range(k))],
    "row by row": lambda n, k: [Call((i,)) for i in range(n * k)],
    "row by row, named": lambda n, k: [Call((i,), (i // n,)) for i in range(n * k)],
    "rows backwards": lambda n, k: [Call(range(n * k)[::-1])],
    "rows backwards, named": lambda n, k: [Call(range(n * k)[::-1], range(k)[::-1])],
    "pictures together": lambda n, k: [Call([p * n + i for i in range(n) for p in range(k)])],
    "picture by picture": lambda n, k: [Call(range(i, n * k, n)) for i in range(n)],
    "twice": lambda n, k: [Call([*range(n * k)] * 2)],
    "twice, named": lambda n, k: [Call([*range(n * k)] * 2, [*range(k)] * 2)],
    "every row twice": lambda n, k: [Call([i // 2 for i in range(2 * n * k)])],
    "one row more": lambda n, k: [Call([*range(n * k), 0])],
    "halves": lambda n, k: [Call(range(n * k)[: n * k // 2 or 1]), *_rest(n * k)],
    "no names": lambda n, k: [Call(range(n * k), None)],
    "no names, prompt by prompt": lambda n, k: [Call(_chunk(i, n), None) for i in range(k)],
    "first name only": lambda n, k: [Call(range(n * k), (0,))],
    "one name for all": lambda n, k: [Call(range(n * k), [0] * k)],
    "names swapped": lambda n, k: [Call(range(n * k), range(k)[::-1])],
    "a name more": lambda n, k: [Call(range(n * k), [*range(k), 0])],
}
FRESH = {"new names": PLANS["as it is"], "new names, row by row": PLANS["row by row, named"]}


def _rest(rows: int) -> list[Call]:
    half = rows // 2 or 1
    return [Call(range(half, rows))] if rows > half else []


def named_wrapper(name: str) -> Callable[[Any, dict[str, Any]], Tensor]:
    """The wrapper of one of the plans above."""
    return wrapper(FRESH[name], fresh=True) if name in FRESH else wrapper(PLANS[name])

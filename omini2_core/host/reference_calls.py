"""The call of an editing model's forward, with other arguments than the host gave it."""

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..engine.evaluation import rows_of

METHOD = "ref_latents_method"


def changed(bound: inspect.BoundArguments, changes: Mapping[str, Any]) -> inspect.BoundArguments:
    """The same call with other arguments, as far as the model takes them."""
    known = bound.signature.parameters
    taken = {name: value for name, value in changes.items() if name in known}
    return inspect.BoundArguments(bound.signature, OrderedDict({**bound.arguments, **taken}))


def some(value: Any, rows: Sequence[int], batch: int) -> Any:
    """Some rows of what has one for each of the batch; anything else as it is."""
    whole = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
    return rows_of(value, rows) if whole else value


def apart(
    bound: inspect.BoundArguments,
    rows: Sequence[int],
    picture: Tensor,
    latents: Sequence[Tensor],
    method: str | None,
    post_input: Any = None,
) -> inspect.BoundArguments:
    """A call on references of some rows, with one token of the prompt, at time 0.

    Nothing that is patched onto the picture or the prompt is there.

    Args:
        picture: (batch, channels, ..., height, width), in the picture's place.
        latents: of the references, with as many rows as ``rows`` has.
        method: how references are placed; None for what the call says.
        post_input: the one patch that is there, if any.
    """
    given, batch = bound.arguments, len(bound.arguments["x"])
    foreign = ("patches", "patches_replace")
    options = {k: v for k, v in given["transformer_options"].items() if k not in foreign}
    if post_input is not None:
        options["patches"] = {"post_input": [post_input]}
    changes: dict[str, Any] = {
        "x": some(picture, rows, batch),
        "ref_latents": list(latents),
        "context": some(given["context"], rows, batch)[:, :1],
        "control": None,
        "attention_mask": None,
        "transformer_options": options,
    }
    for name, value in given.items():
        if name.startswith("timestep"):
            changes[name] = 0 * some(value, rows, batch)
        elif name == "kwargs":
            changes[name] = {key: some(each, rows, batch) for key, each in value.items()}
        elif name not in changes:
            changes[name] = some(value, rows, batch)
    more = changes.setdefault("kwargs", {})
    more.pop("attention_mask", None)
    more.pop("control", None)
    if method is not None:
        more[METHOD] = method
    return changed(bound, changes)

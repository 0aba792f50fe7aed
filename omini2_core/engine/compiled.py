"""What torch.compile is to leave alone, said in a way that keeps a function's type."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """The function, run as it is, with everything that it calls."""
    return cast(Function, torch.compiler.disable(function))


def uncompiled_itself(function: Function) -> Function:
    """The function, run as it is; what it calls may be compiled."""
    return cast(Function, torch.compiler.disable(function, recursive=False))

"""A node's schema, with words to find it by where the host has them."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

HAS_ALIASES = any(field.name == "search_aliases" for field in fields(io.Schema))


def schema(*, search_aliases: Sequence[str], **given: Any) -> io.Schema:
    """``io.Schema``; hosts older than its ``search_aliases`` go without."""
    if HAS_ALIASES:
        given["search_aliases"] = list(search_aliases)
    return io.Schema(**given)

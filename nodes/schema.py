"""A node's schema, with words to find it by where the host has them."""

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..omini2_core.host.versions import search_aliases as aliases


def schema(*, search_aliases: Sequence[str], **given: Any) -> io.Schema:
    """``io.Schema``; hosts older than its ``search_aliases`` go without."""
    return io.Schema(**given, **aliases(search_aliases))

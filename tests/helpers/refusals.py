"""How wrong input is refused: in one sentence that names the input and the way out."""

import re

import pytest

from omini2_extension.omini2_core.errors import Omini2Error


def refused(pattern: str):
    return pytest.raises(Omini2Error, match=re.compile(pattern, re.DOTALL))


def sentence(error) -> None:
    """One sentence: what happened, which input, what to do."""
    text = str(error.value)
    assert re.match(r"^[a-z_]+: .*\.$", text, re.DOTALL), text
    assert "\n" not in text

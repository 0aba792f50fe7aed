"""The file parsers under atheris, which keeps inputs that reach new lines of ours:
`python -m dev.quality.fuzz.coverage PARSER [libFuzzer's options, as -runs=100000]`.

Needs `pip install -r dev/quality/fuzz/requirements.txt`.
"""

from __future__ import annotations

import logging
import sys
from random import Random

import atheris

from dev import load


class BytesRandom(Random):
    """Choices that are read from bytes, and zero where those end."""

    def __init__(self, data: bytes) -> None:
        self._bits, self._left = int.from_bytes(data, "little"), 8 * len(data)
        super().__init__(0)

    def getrandbits(self, k: int) -> int:
        """The next bits."""
        taken = self._bits & ((1 << k) - 1)
        self._bits >>= k
        return taken

    def random(self) -> float:
        """The next 53 bits as a share."""
        return self.getrandbits(53) / (1 << 53)


def main() -> None:
    """Runs until libFuzzer has had enough; a finding ends it with the input as a file."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    load.load_host()
    with atheris.instrument_imports(include=["omini2_extension.omini2_core"]):
        load.load_extension()
    logging.disable(logging.ERROR)
    import torch

    from dev.quality.fuzz.parsers import PARSERS

    files = {name: parser for name, parser in PARSERS.items() if parser.is_file}
    if name not in files:
        sys.exit(f"name a parser of files first: {', '.join(files)}")
    parser = files[name]

    def one(data: bytes) -> None:
        # Half of them as they are, half as the choices of our own mutations.
        as_it_is = data[:1] > b"\x7f"
        given = data[1:] if as_it_is else parser.draw(BytesRandom(data[1:]))
        with torch.inference_mode():
            parser.check(given)

    # From the first input on as long as choices need it; libFuzzer would begin with 4 bytes.
    atheris.Setup([sys.argv[0], "-len_control=0", "-max_len=2048", *sys.argv[1:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""``python -m omini2_core.training CONFIG.yaml``: trains condition LoRAs."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from ..errors import Omini2Error

STOPPING = "Stopping as soon as this step is written; Ctrl+C once more stops at once."
STOPPED = "Stopped. Start it again to go on from the last checkpoint."


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after an error said in one sentence, 130 after Ctrl+C."""
    parser = argparse.ArgumentParser(
        prog="python -m omini2_core.training",
        description="Trains condition LoRAs for FLUX.1; see docs/training.md.",
    )
    parser.add_argument("config", type=Path, help="a YAML file, as in docs/training.md")
    parser.add_argument("--check", action="store_true", help="only check the config")
    parser.add_argument("--memory", action="store_true", help="only say what the run needs")
    options = parser.parse_args(arguments)
    # Of several processes, one says what they have in common.
    speaks = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING if speaks else logging.ERROR, format="%(message)s")
    try:
        try:
            from .config import load_config
            from .loop import train
            from .processes import end_processes
        except ImportError as error:
            raise Omini2Error(
                f"The trainer needs {error.name}, which is not installed; install what it needs "
                'with pip install ".[train]" in the extension\'s folder.'
            ) from error
        config = load_config(options.config)
        if options.check:
            print(f"{options.config} can be used.")
            return 0
        if options.memory:
            from .memory import statement

            print(statement(config))
            return 0
        from .progress import Bar

        with Bar() as bar, ctrl_c() as asked:
            try:
                result = train(config, report=bar.show, should_stop=asked.is_set)
            finally:
                end_processes()
    except Omini2Error as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130
    for path in result.loras if speaks else ():
        print(path)
    if result.stopped:
        print(STOPPED, file=sys.stderr)
    return 130 if result.stopped else 0


@contextmanager
def ctrl_c() -> Iterator[Event]:
    """Set by the first Ctrl+C, so that a step can be ended and its LoRAs written."""
    asked = Event()

    def ask(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(STOPPING, file=sys.stderr)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())

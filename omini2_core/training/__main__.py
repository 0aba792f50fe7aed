"""``python -m omini2_core.training CONFIG.yaml``: trains condition LoRAs."""

import argparse
import logging
import sys
from pathlib import Path

from ..errors import Omini2Error


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after an error said in one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m omini2_core.training",
        description="Trains condition LoRAs for FLUX.1; see docs/training.md.",
    )
    parser.add_argument("config", type=Path, help="a YAML file, as in docs/training/")
    parser.add_argument("--check", action="store_true", help="only check the config")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        try:
            from .config import load_config
            from .loop import train
        except ImportError as error:
            raise Omini2Error(
                f"The trainer needs {error.name}, which is not installed; install what it needs "
                'with pip install ".[train]" in the extension\'s folder.'
            ) from error
        config = load_config(options.config)
        if options.check:
            print(f"{options.config} can be used.")
            return 0
        from .progress import Bar

        with Bar() as bar:
            result = train(config, report=bar.show)
    except Omini2Error as error:
        print(error, file=sys.stderr)
        return 1
    for path in result.loras:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

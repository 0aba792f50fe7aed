"""How the extension speaks to the person at the screen."""

import logging


class Omini2Error(ValueError):
    """An input that can't be used: one sentence naming the node input and the way out."""


def warn(message: str) -> None:
    """Says what was changed or left out although the run goes on."""
    logging.warning("Omini2: %s", message)

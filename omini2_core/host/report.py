"""What the host tells the person: figures, progress and warnings in the editor, a line in the log.

Everything goes to the editor that queued the prompt, through the server's own events; without a
server (tests, benchmarks) or without such an editor there is only the log.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

from ..engine.run import RunStats
from ..errors import Remedy, on_warning
from .figures import Figures
from .remedies import Prompt, place

RUN_EVENT, WARNING_EVENT = "omini2.run", "omini2.warning"
UPDATES = 20  # of the bar while K/V are computed; more would be messages that nobody sees


class Reported(Protocol):
    """A run of conditions or references."""

    @property
    def stats(self) -> RunStats:
        """What it did."""


def report(run: Reported, steps: int, seconds: float, nodes: dict[str, Figures]) -> None:
    """One log line a run, and the same figures for the editor's nodes.

    Args:
        nodes: what each node shows, see :mod:`.figures`.
    """
    stats = run.stats
    kept, spot, what, saved = stats.references, stats.spot, [], []
    if spot is not None:
        h, w = spot.hw
        edited = h * w if spot.edited is None else int(spot.edited.sum())
        what.append(f"Spot Edit of {edited} in {h * w} tokens")
        saved.append(f"{100 * (1 - spot.share):.0f} % of the model's rows saved")
    elif stats.tokens or kept is None:
        tokens = "+".join(map(str, stats.tokens))
        what.append(f"{len(stats.tokens)} condition(s), {tokens} tokens")
        saved.append(f"{100 * stats.spared:.0f} % of the condition work saved")
    if kept is not None:
        attention = "isolated" if kept.isolated else "joint"
        what.append(f"{kept.count} {attention} reference(s), {kept.tokens} tokens")
        saved.append(f"{100 * kept.spared:.0f} % of the references' work saved")
        if kept.drift is not None:
            saved.append(f"their K/V up to {kept.drift:.1e} from those they replaced")
    logging.info(
        "Omini2: %s, K/V %.1f MB (storage %s, keep_on %s), computed %d time(s) in %d step(s), %d "
        "reused from the last run, %s.",
        ", ".join(what),
        stats.kv_bytes / 1e6,
        stats.storage,
        stats.keep_on,
        stats.refreshes,
        steps,
        stats.reused,
        ", ".join(saved),
    )
    figures = asdict(replace(stats, spot=None)) | {
        "steps": steps,
        "seconds": seconds,
        "saved": stats.spared,
    }
    send(RUN_EVENT, {**figures, "nodes": nodes})


def send(event: str, data: dict[str, Any]) -> None:
    """Sends an event to the editor that queued the prompt, with the prompt's and the node's id."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    instance = getattr(server, "instance", None)
    # Without an addressee the server would tell all editors, whatever graphs they have open.
    if instance is None or instance.client_id is None:
        return
    context = get_executing_context()
    if context is not None:
        data = {**data, "prompt_id": context.prompt_id, "node": context.node_id}
    instance.send_sync(event, data, instance.client_id)


def cache_progress(node: str | None) -> Callable[[int, int], None] | None:
    """A bar on the Condition Cache node while K/V are computed, beside KSampler's own."""
    if node is None:
        return None

    def show(done: int, total: int) -> None:
        if done < total and done % max(1, total // UPDATES):
            return
        progress = get_progress_state()
        progress.update_progress(node, done, total)
        if done == total:
            progress.finish_progress(node)

    return show


def _send_warning(message: str, remedies: Sequence[Remedy]) -> None:
    """A sentence, and which node's inputs are to have which values for it to be the last time."""
    context = get_executing_context()
    running, prompt = (None, {}) if context is None else (context.node_id, _prompt(context))
    placed = [(place(remedy, prompt, running), remedy.values) for remedy in remedies]
    found = [{"node": node, "values": dict(values)} for node, values in placed if node is not None]
    send(WARNING_EVENT, {"message": message, "remedies": found})


def _prompt(context: Any) -> Prompt:
    """The prompt that runs, as the editor sent it."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    queue = getattr(getattr(server, "instance", None), "prompt_queue", None)
    items = list(getattr(queue, "currently_running", {}).values())
    return next((item[2] for item in items if item[1] == context.prompt_id), {})


on_warning(_send_warning)

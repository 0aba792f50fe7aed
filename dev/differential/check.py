"""Judges a graph by its oracle, and makes a graph that is judged wrong as small as it gets."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import torch

from .edits import ORACLES
from .graph import Graph, described, simpler
from .oracles import Compared, Wrong
from .run import Bench, Late, difference, is_refusal, is_sentence, said

EQUAL, REFUSED, SAID, UNFIT, FINDING = "equal", "refused", "said", "unfit", "finding"
ROUNDING = 1e-6  # what the noise is changed by, to see what rounding may do
CHAOS = 1e-2  # what it may become before nothing can be told of a graph


@dataclass(frozen=True)
class Outcome:
    """What came of a graph.

    Attributes:
        what: one of the words above; ``unfit`` where the host itself fails at it.
        kind: of a finding, without its numbers; the sentence of a refusal or warning.
    """

    what: str
    kind: str = ""
    detail: str = ""


def judge(name: str, graph: Graph) -> Outcome:
    """Builds and runs a graph, and compares."""
    oracle = ORACLES[name]
    with said() as lines:
        try:
            compared = oracle(Bench(graph))
        except Wrong as wrong:
            return Outcome(FINDING, "wrong", str(wrong))
        except Late as late:
            return Outcome(FINDING, "late refusal", str(late))
        except Exception as error:
            return _failed(graph, error)
    if not torch.isfinite(compared.want).all():
        return Outcome(UNFIT, "not finite")
    if not torch.isfinite(compared.got).all():
        return Outcome(FINDING, "not a number")
    error = difference(compared.got, compared.want)
    if compared.apart:
        if error > compared.tolerance:
            return Outcome(EQUAL)
        return Outcome(FINDING, "no effect", f"{error:.1e}")
    about_model = [line for line in lines if line.startswith("model: ")]
    if error <= compared.tolerance:
        if compared.excuse and name == "lora" and about_model:
            return Outcome(FINDING, "false alarm", about_model[0])
        return Outcome(EQUAL)
    if compared.excuse and about_model:
        return Outcome(SAID, about_model[0])
    if error < CHAOS and compared.tolerance:
        shaken = _rounding(name, graph, compared)
        if shaken > CHAOS:
            return Outcome(UNFIT, "chaotic")
        if error <= 10 * shaken:
            return Outcome(EQUAL)
    return Outcome(FINDING, "differs", f"{error:.1e}, said {lines[:2]}")


def _rounding(name: str, graph: Graph, compared: Compared) -> float:
    with said():
        other = ORACLES[name](Bench(graph, nudge=ROUNDING))
    return difference(other.want, compared.want)


def _failed(graph: Graph, error: Exception) -> Outcome:
    message = str(error)
    if is_refusal(error):
        if is_sentence(message):
            return Outcome(REFUSED, message)
        return Outcome(FINDING, "bad sentence", message)
    try:  # whether the host can do it at all
        Bench(graph).plain()
    except Exception as own:
        if type(own) is type(error):
            return Outcome(UNFIT, f"host: {type(own).__name__}")
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{where.filename.rsplit('/', 1)[-1]}:{where.name}"
    kind = f"traceback {type(error).__name__} in {place}"
    return Outcome(FINDING, kind, message[:200])


def smallest(name: str, graph: Graph, kind: str, tries: int = 150) -> Graph:
    """A graph with less in it that gives the same kind of finding."""
    found = True
    while found and tries > 0:
        found = False
        for other in simpler(graph):
            tries -= 1
            if tries <= 0:
                break
            try:
                outcome = judge(name, other)
            except Exception:  # it makes no sense any more
                continue
            if outcome.what == FINDING and outcome.kind == kind:
                graph, found = other, True
                break
    return graph


def program(name: str, graph: Graph) -> str:
    """What reproduces it."""
    return f"judge({name!r}, {described(graph)})"

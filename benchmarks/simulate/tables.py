"""The tables of what was counted on pretended cards."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.simulate.card import ATTENTION, CARDS, GIB, MEMORY, PRODUCTS
from benchmarks.simulate.cases import FP8, plain_of
from dev.markdown import table

Run = Mapping[str, Any]


def tables(results: Mapping[str, Any]) -> str:
    """All of them, as text."""
    work = {run["case"]: run for run in results["work"]}
    loads = {card: {run["case"]: run for run in results[f"load {card}"]} for card in CARDS}
    parts = [work_of(work), reservations(work, loads["80"])]
    parts += [on_cards(loads, weights) for weights in ("", FP8)]
    parts += [enforced(results[name]) for name in results if name.startswith("enforced")]
    return "\n\n".join(parts)


def roofline() -> str:
    """What the ratios rest on."""
    return (
        "a kernel takes as long as the slower of its arithmetic and its memory traffic, at "
        f"{PRODUCTS:.0%} of the data sheet's FLOPs for products, {ATTENTION:.0%} for attention and "
        f"{MEMORY:.0%} of its bandwidth; launches, and copies between the memories, take nothing"
    )


def work_of(work: Mapping[str, Run]) -> str:
    """What a step does: the first one, which computes conditions, and a later one."""
    ratios = (f"over plain, {card} GB card" for card in CARDS)
    head = ("case", "step", "kernels", "TFLOP", "GB moved", "fetched", "waits more than plain",
            "GiB beside the weights", *ratios)  # fmt: skip
    rows = []
    for name, run in work.items():
        if run["error"]:
            rows.append([name, run["error"], *["-"] * (len(head) - 2)])
            continue
        plain = work[plain_of(name)]["evaluations"]
        for which in (0, -1):
            here, there = run["evaluations"][which], plain[which]
            ratios = (here["seconds"][card] / there["seconds"][card] for card in CARDS)
            rows.append([
                name, "later" if which else "first", f"{here['kernels']:.0f}",
                f"{here['flops'] / 1e12:.1f}", f"{here['bytes'] / 1e9:.0f}",
                f"{here['to_device'] / 1e9:.2f} GB", here["waits"] - there["waits"],
                f"{(here['peak'] - here['base']) / GIB:.2f}", *(f"{r:.3f}" for r in ratios),
            ])  # fmt: skip
    return table(head, rows)


def reservations(work: Mapping[str, Run], loads: Mapping[str, Run]) -> str:
    """What the host is asked to leave free beyond plain, and what is needed beyond plain."""
    rows = []
    for name, load in loads.items():
        name = name.removesuffix(FP8)
        plain = plain_of(name)
        if name == plain or name in [row[0] for row in rows]:
            continue
        asked = load["asked"] - loads[f"{plain}{FP8}"]["asked"]
        needed = work[name]["above"] - work[plain]["above"]
        rows.append([
            name, f"{work[name]['kept'] / GIB:.2f}", f"{asked / GIB:.2f}", f"{needed / GIB:.2f}",
            f"{asked / needed:.2f}",
        ])  # fmt: skip
    head = "case", "K/V, GiB", "reserved beyond plain", "needed beyond plain", "reserved / needed"
    return table(head, rows)


def on_cards(loads: Mapping[str, Mapping[str, Run]], weights: str) -> str:
    """Where K/V are, and how much of the weights is fetched at every step."""
    rows = []
    for name in loads["80"]:
        if name.endswith(FP8) != bool(weights):
            continue
        cells = []
        for runs in loads.values():
            run = runs[name]
            place = {"-": "", "gpu": "K/V here, ", "cpu": "K/V away, "}[run["place"]]
            cells.append(f"{place}{(run['size'] - run['loaded']) / 1e9:.2f} GB")
        rows.append([name.removesuffix(FP8), *cells])
    return table((weights.strip(", ") or "16-bit weights", *(f"{c} GB" for c in loads)), rows)


def enforced(runs: Sequence[Run]) -> str:
    """Whole runs on a card that does run out of memory."""
    rows = [
        [
            run["case"], run["error"] or "finished", run["place"],
            f"{(run['size'] - run['loaded']) / 1e9:.2f} GB",
            f"{run['evaluations'][-1]['peak'] / GIB:.2f} GiB", "; ".join(run["said"]) or "-",
        ]
        for run in runs
    ]  # fmt: skip
    return table(("case", "run", "K/V", "weights fetched", "peak", "said"), rows)

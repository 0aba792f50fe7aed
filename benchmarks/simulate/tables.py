"""The tables of what was counted on pretended cards."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.simulate.card import ATTENTION, CARDS, GIB, MEMORY, PRODUCTS
from benchmarks.simulate.cases import FP8, plain_of
from dev.markdown import table

Run = Mapping[str, Any]


def section(results: Mapping[str, Any]) -> str:
    """The part of docs/performance.md."""
    work = {run["case"]: run for run in results["work"]}
    loads = {card: {run["case"]: run for run in results[f"load {card}"]} for card in CARDS}
    runs = [run | {"card": card} for card in CARDS for run in results.get(f"enforced {card}", ())]
    return "\n\n".join([
        "## Which setting for which card",
        "Computed, not measured: the host runs the real models at their full size on pretended "
        f"cards, whose tensors have no numbers (`make simulate`; {results['host']}). No GPU was "
        "lent for it. 1024x1024 pixels, 512 text tokens, conditions of 1024 tokens, references of "
        "the picture's size, LoRAs of rank 4, cfg 1 unless it says cfg. A card has its GiB, less "
        "0.6 for the driver and a desktop.",
        "### What is fetched anew at every step",
        "GB of the weights that ComfyUI leaves off the card. `keep_on: auto` decides where K/V "
        "are: *here* on the card, *away* in pinned memory, from where each step brings them "
        "beside the computation, 0.72 GB for a condition and 2.87 GB for a reference.",
        on_cards(loads, FP8),
        on_cards(loads, ""),
        "Whole runs on cards that do run out of memory:",
        enforced(runs),
        "In short: leave `keep_on` at auto. Make conditions compact first (compression 0.5 divides "
        "K/V by four), then set `storage` to fp8 (by two). A negative prompt or image guidance "
        "doubles K/V.",
        "### What is reserved, and what is needed",
        "GiB beyond plain FLUX: what ComfyUI is asked to leave free, and what is taken at most.",
        reservations(work, loads["80"]),
        "### What a step does",
        f"*first* computes the K/V, *later* uses them. {roofline()}",
        work_of(work),
    ])  # fmt: skip


def roofline() -> str:
    """What the ratios rest on."""
    return (
        "*over plain* is by a roofline: a kernel takes as long as the slower of its arithmetic and "
        f"its memory traffic, at {PRODUCTS:.0%} of the data sheet's FLOPs for products, "
        f"{ATTENTION:.0%} for attention and {MEMORY:.0%} of its bandwidth; launches, and copies "
        "between the memories, take nothing. The cards: "
        f"{', '.join(card.name for card in CARDS.values())}."
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
        if name.endswith(", plain"):
            continue  # which others are compared to
        plain = work[plain_of(name)]["evaluations"]
        for which in (0, -1)[: len(run["evaluations"])]:
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
            f"{run['card']} GB", run["case"], run["error"] or "finished",
            {"-": "-", "gpu": "here", "cpu": "away"}[run["place"]],
            f"{(run['size'] - run['loaded']) / 1e9:.2f} GB",
            f"{run['evaluations'][0]['peak'] / GIB:.2f} GiB",
        ]
        for run in runs
    ]  # fmt: skip
    return table(("card", "case", "run", "K/V", "weights fetched a step", "peak"), rows)

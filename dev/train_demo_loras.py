"""Trains the demo model's condition LoRAs with the trainer that users have.

`python -m dev.train_demo_loras [NAME ...]`: the scenes of `python -m dev.make_training_data`, one
config each, in the order below. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from dev.make_demo_model import DEMO_MODEL
from dev.make_training_data import FOLDER, SIDE
from dev.paths import ROOT

WORK = FOLDER.parent / "loras"
COMPACT = [[side, side] for side in (SIDE, SIDE // 2, SIDE // 4, SIDE // 8)]
TOKENS = SIDE // 16

COMMON: dict[str, Any] = {
    "base": "demo",
    "cache": str(WORK / "cache"),
    "target_size": SIDE,
    "rank": 4,
    "batch_size": 16,
    "gradient_checkpointing": False,
    "optimizer": {"type": "adamw", "lr": 3e-3, "schedule": "cosine", "warmup_steps": 20},
    "max_grad_norm": 1.0,
    "checkpoint_every": 50,
    "threads": 1,  # two runs side by side are faster than one on two cores
}
PICTURES = {"folder": str(FOLDER / "pictures")}
EDGES = {"type": "folder", "folder": str(FOLDER / "edges")}

# By the name of the file; `steps` and what differs from COMMON.
RUNS: dict[str, dict[str, Any]] = {
    "edges": {"conditions": [{**EDGES, "independent_condition": True}], "steps": 400},
    "edges_joint": {"conditions": [EDGES], "steps": 250, "after": "edges"},
    "edges_compact": {
        "conditions": [{**EDGES, "independent_condition": True, "condition_size": COMPACT}],
        "steps": 250,
        "after": "edges",
    },
    "edges_pruned": {
        "conditions": [{**EDGES, "independent_condition": True, "pruning": True}],
        "steps": 100,
        "after": "edges",
    },
    "depth": {
        "conditions": [{"type": "folder", "folder": str(FOLDER / "depth"),
                        "independent_condition": True, "condition_size": COMPACT}],
        "steps": 200,
        "after": "edges_compact",
    },
    "deblurring": {
        "conditions": [{"type": "blur", "blur_radius": [1, 10], "independent_condition": True,
                        "condition_size": COMPACT}],
        "steps": 200,
        "after": "edges_compact",
    },
    "colouring": {
        "conditions": [{"type": "grey", "independent_condition": True}],
        "steps": 150,
        "after": "edges",
    },
    "inpainting": {
        "conditions": [{"type": "resize", "integration": True, "independent_condition": True}],
        "steps": 250,
    },
    "inpainting_masked": {
        "conditions": [{"type": "mask", "independent_condition": True,
                        "condition_size": COMPACT}],
        "steps": 150,
        "after": "deblurring",
    },
    "subject": {
        "data": {"folder": str(FOLDER / "subject_pictures")},
        "conditions": [{"type": "folder", "folder": str(FOLDER / "subject"),
                        "independent_condition": True, "position_delta": [0, TOKENS]}],
        "steps": 350,
        "drop_text_prob": 0.05,
    },
}  # fmt: skip


def file_name(name: str) -> str:
    return f"omini2_demo_{name}"


def config(name: str) -> dict[str, Any]:
    """The trainer's config of a run."""
    run = dict(RUNS[name])
    after = run.pop("after", None)
    [condition] = run["conditions"]
    condition = {**condition, "name": file_name(name)}
    if after is not None:
        condition["init_lora"] = str(DEMO_MODEL / "loras" / f"{file_name(after)}.safetensors")
    output = {"output": str(WORK / name), "data": PICTURES}
    return {**COMMON, **output, **run, "conditions": [condition]}


def train(name: str) -> None:
    """Runs the trainer, and puts the LoRA and its loss curve into demo_model/."""
    WORK.mkdir(parents=True, exist_ok=True)
    path = WORK / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config(name)))
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "omini2_core.training", path], cwd=ROOT, check=True)
    minutes = (time.monotonic() - start) / 60
    print(f"{name}: {minutes:.1f} minutes", flush=True)
    lora = f"{file_name(name)}.safetensors"
    shutil.copyfile(WORK / name / lora, DEMO_MODEL / "loras" / lora)
    record(name)


def record(name: str, every: int = 20) -> None:
    """The loss curve, a mean of each `every` steps, beside the model's own."""
    lines = (WORK / name / "loss.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    first = points[0]["time"]
    folder = DEMO_MODEL / "training"
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "loss", "seconds"))
        for i in range(0, len(points), every):
            part = points[i : i + every]
            loss = sum(p["loss"] for p in part) / len(part)
            writer.writerow((part[-1]["step"], f"{loss:.4f}", part[-1]["time"] - first))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *RUNS], metavar="NAME")
    parser.add_argument("--show", type=Path, help="write the configs here and stop")
    args = parser.parse_args()
    for name in args.names or RUNS:
        if args.show:
            args.show.mkdir(exist_ok=True)
            (args.show / f"{name}.yaml").write_text(yaml.safe_dump(config(name)))
        else:
            train(name)


if __name__ == "__main__":
    main()

"""Trains the demo model's condition LoRAs with the trainer that users have.

`python -m dev.demo_model.train_loras [NAME ...]`: the scenes of
`python -m dev.demo_model.training_data`, one config each, in the order below. A run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from dev.demo_model.make_model import DEMO_MODEL
from dev.demo_model.training_data import FOLDER, SIDE
from dev.paths import ROOT

WORK = FOLDER.parent / "loras"
COMPACT = [[side, side] for side in (SIDE, SIDE // 2, SIDE // 4, SIDE // 8)]
SUBJECT_SIDE = 64  # few tokens, each of which the whole picture looks at

COMMON: dict[str, Any] = {
    "base": "demo",
    "cache": str(WORK / "cache"),
    "target_size": SIDE,
    "rank": 6,
    "batch_size": 8,
    "gradient_checkpointing": False,
    "max_grad_norm": 1.0,
    "time_shift": 12.0,
    "drop_image_prob": 0.02,
    "checkpoint_every": 100,
    "threads": 1,  # two runs side by side are faster than one on two cores
}
OPTIMIZER = {"type": "adamw", "lr": 3e-3, "schedule": "cosine", "warmup_steps": 20}
FINER: dict[str, Any] = {"lr": 2e-3, "time_shift": 5.0}  # what things are made of counts more
PICTURES = {"folder": str(FOLDER / "pictures")}
EDGES = {"type": "folder", "folder": str(FOLDER / "edges")}
DEPTH = {"type": "folder", "folder": str(FOLDER / "depth")}
SUBJECT = {
    "type": "folder",
    "folder": str(FOLDER / "subject"),
    "condition_size": SUBJECT_SIDE,
    "position_delta": [0, -(SUBJECT_SIDE // 16)],  # to the left, where the text's positions are
    "position_scale": 1,
}

# By the name of the file; what differs from COMMON, `lr` for the optimizer's, and the run that it
# goes on `after`. Trained from nothing, a LoRA for anything but a likeness of the picture learns to
# shut its tokens out and stays there, so all of them begin by copying the picture; the subject,
# which lies elsewhere, begins where it is all that there is to see.
RUNS: dict[str, dict[str, Any]] = {
    "copying": {"conditions": [{"type": "resize"}], "steps": 150},
    "edges_fading": {
        "conditions": [{**EDGES, "fade_steps": 250}],
        "steps": 400,
        "drop_image_prob": 0.1,
    },
    "edges_noisy": {"conditions": [EDGES], "steps": 600, "lr": 2e-3, "after": "edges_fading"},
    "edges": {"conditions": [EDGES], "steps": 1800, **FINER, "after": "edges_noisy"},
    "edges_joint": {
        "conditions": [{**EDGES, "independent_condition": False}],
        "steps": 400,
        **FINER,
        "after": "edges",
    },
    "edges_compact": {
        "conditions": [{**EDGES, "condition_size": COMPACT}],
        "steps": 800,
        **FINER,
        "after": "edges",
    },
    "edges_pruned": {
        "conditions": [{**EDGES, "pruning": True}],
        "steps": 250,
        **FINER,
        "after": "edges",
    },
    "depth_fading": {
        "conditions": [{**DEPTH, "fade_steps": 250}],
        "steps": 600,
        "after": "copying",
    },
    "depth": {
        "conditions": [{**DEPTH, "condition_size": COMPACT}],
        "steps": 500,
        **FINER,
        "after": "depth_fading",
    },
    "deblurring": {
        "conditions": [{"type": "blur", "blur_radius": [1, 10], "condition_size": COMPACT}],
        "steps": 400,
        **FINER,
        "after": "copying",
    },
    "colouring": {
        "conditions": [{"type": "grey", "fade_steps": 150}],
        "steps": 600,
        "lr": 2e-3,
        "after": "copying",
    },
    "inpainting": {
        "conditions": [{"type": "resize", "integration": True}],
        "steps": 900,
        **FINER,
        "after": "copying",
    },
    "inpainting_masked": {
        "conditions": [{"type": "mask", "condition_size": COMPACT}],
        "steps": 400,
        **FINER,
        "after": "deblurring",
    },
    "subject_single": {
        "data": {"folder": str(FOLDER / "subject_single")},
        "conditions": [SUBJECT],
        "steps": 600,
    },
    "subject_mixed": {
        "data": {"folder": str(FOLDER / "subject_pictures")},
        "conditions": [SUBJECT],
        "steps": 900,
        **FINER,
        "after": "subject_single",
    },
    "subject": {
        "data": {"folder": str(FOLDER / "subject_pictures")},
        "conditions": [SUBJECT],
        "steps": 1300,
        "time_shift": 8.0,
        "after": "subject_mixed",
    },
}  # fmt: skip
# Not shipped.
STEPPING_STONES = {
    "copying", "edges_fading", "edges_noisy", "depth_fading", "subject_single", "subject_mixed",
}  # fmt: skip


def file_name(name: str) -> str:
    return f"omini2_demo_{name}"


def config(name: str) -> dict[str, Any]:
    """The trainer's config of a run."""
    run = dict(RUNS[name])
    after, rate = run.pop("after", None), run.pop("lr", OPTIMIZER["lr"])
    [condition] = run["conditions"]
    condition = {"independent_condition": True, **condition, "name": file_name(name)}
    if after is not None:
        condition["init_lora"] = str(trained(after))
    output = {"output": str(WORK / name), "data": PICTURES, "optimizer": {**OPTIMIZER, "lr": rate}}
    return {**COMMON, **output, **run, "conditions": [condition]}


def trained(name: str) -> Path:
    """Where a run's LoRA ends up."""
    file = f"{file_name(name)}.safetensors"
    return (WORK / name if name in STEPPING_STONES else DEMO_MODEL / "loras") / file


def train(name: str) -> None:
    """Runs the trainer, and puts the LoRA, its settings and its loss curve into demo_model/."""
    WORK.mkdir(parents=True, exist_ok=True)
    path = WORK / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config(name)))
    subprocess.run([sys.executable, "-m", "omini2_core.training", path], cwd=ROOT, check=True)
    if name not in STEPPING_STONES:
        trained(name).parent.mkdir(exist_ok=True)
        shutil.copyfile(WORK / name / trained(name).name, trained(name))
    record(name)


def record(name: str, every: int = 20) -> None:
    """The loss curve, a mean of each `every` steps, and the settings beside the model's own."""
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
    used, after = config(name), RUNS[name].get("after")
    kept = ("steps", "batch_size", "rank", "time_shift", "drop_text_prob", "drop_image_prob")
    settings = {key: value for key, value in used.items() if key in kept}
    minutes = round((points[-1]["time"] - first) / 60, 1)
    path = folder / "loras.json"
    runs = json.loads(path.read_text()) if path.is_file() else {}
    runs[name] = {**settings, "lr": used["optimizer"]["lr"], "seed": used.get("seed", 0),
                  "after": after, "minutes": minutes}  # fmt: skip
    ordered = {key: runs[key] for key in RUNS if key in runs}
    path.write_text(json.dumps(ordered, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *RUNS], metavar="NAME")
    parser.add_argument("--show", type=Path, help="write the configs here and stop")
    parser.add_argument("--record", action="store_true", help="only write down what was trained")
    args = parser.parse_args()
    for name in args.names or RUNS:
        if args.show:
            args.show.mkdir(exist_ok=True)
            (args.show / f"{name}.yaml").write_text(yaml.safe_dump(config(name)))
        elif args.record:
            record(name)
        else:
            train(name)


if __name__ == "__main__":
    main()

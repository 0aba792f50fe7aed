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
BEFORE = {"type": "folder", "folder": str(FOLDER / "edits" / "before")}
BRINGING = [
    {"type": "folder", "folder": str(FOLDER / "bringing" / name)} for name in ("before", "other")
]
AFTER = {"folder": str(FOLDER / "edits" / "after")}
EDITING: dict[str, Any] = {
    "data": {**AFTER, "limit": 1024},
    "rank": 32,
    "lr": 1e-3,
    "time_shift": 5.0,
    "drop_text_prob": 0.05,
}
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


def _run(condition: dict[str, Any], steps: int, after: str | None = None, **more: Any) -> Any:
    """What differs from COMMON, `lr` for the optimizer's, and the run that it goes on `after`."""
    return {"conditions": [condition], "steps": steps, "after": after, **more}


def _subject(folder: str, steps: int, after: str | None = None, **more: Any) -> Any:
    return _run(SUBJECT, steps, after, data={"folder": str(FOLDER / folder)}, **more)


def _edit(references: str, steps: int, after: str | None = None, **more: Any) -> Any:
    return _run(BEFORE, steps, after, references=references, **{**EDITING, **more})


# By the name of the file. Trained from nothing, a LoRA for anything but a likeness of the picture
# learns to shut its tokens out and stays there, so all of them begin by copying the picture; the
# subject, which lies elsewhere, begins where it is all that there is to see.
ALL_SIZES = {"condition_size": COMPACT}
RUNS: dict[str, dict[str, Any]] = {
    "copying": _run({"type": "resize"}, 150),
    "edges_fading": _run({**EDGES, "fade_steps": 250}, 400, drop_image_prob=0.1),
    "edges_noisy": _run(EDGES, 600, "edges_fading", lr=2e-3),
    "edges": _run(EDGES, 1800, "edges_noisy", **FINER),
    "edges_joint": _run({**EDGES, "independent_condition": False}, 400, "edges", **FINER),
    "edges_compact": _run({**EDGES, **ALL_SIZES}, 800, "edges", **FINER),
    "edges_pruned": _run({**EDGES, "pruning": True}, 250, "edges", **FINER),
    "depth_fading": _run({**DEPTH, "fade_steps": 250}, 600, "copying"),
    "depth": _run({**DEPTH, **ALL_SIZES}, 500, "depth_fading", **FINER),
    "deblurring": _run(
        {"type": "blur", "blur_radius": [1, 10], **ALL_SIZES}, 400, "copying", **FINER
    ),
    "colouring": _run({"type": "grey", "fade_steps": 150}, 600, "copying", lr=2e-3),
    "inpainting": _run({"type": "resize", "integration": True}, 900, "copying", **FINER),
    "inpainting_masked": _run({"type": "mask", **ALL_SIZES}, 400, "deblurring", **FINER),
    "subject_single": _subject("subject_single", 600),
    "subject_mixed": _subject("subject_pictures", 900, "subject_single", **FINER),
    "subject": _subject("subject_pictures", 1300, "subject_mixed", time_shift=8.0),
    "edit_small": _edit("joint", 1200, target_size=SIDE // 2, time_shift=12.0),
    "edit_words": _edit(
        "joint",
        2200,
        "edit_small",
        target_size=SIDE // 2,
        time_shift=12.0,
        batch_size=16,
        lr=2e-3,
        data={**AFTER, "limit": 4096},
    ),
    "edit_both": _edit("joint", 700, "edit_words"),
    "edit_joint": _edit("joint", 500, "edit_both"),
    "edit_isolated": _edit("isolated", 500, "edit_both"),
    "edit_two_small": _edit(
        "joint",
        1100,
        "edit_words",
        target_size=SIDE // 2,
        time_shift=12.0,
        batch_size=16,
        conditions=BRINGING,
        data={"folder": str(FOLDER / "bringing" / "after")},
    ),
    "edit_two": _edit(
        "joint",
        250,
        "edit_two_small",
        conditions=BRINGING,
        data={"folder": str(FOLDER / "bringing" / "after"), "limit": 160},
    ),
}
# Not shipped.
STEPPING_STONES = {
    "copying", "edges_fading", "edges_noisy", "depth_fading", "subject_single", "subject_mixed",
    "edit_small", "edit_words", "edit_both", "edit_two_small",
}  # fmt: skip


def file_name(name: str) -> str:
    return f"omini2_demo_{name}"


def config(name: str) -> dict[str, Any]:
    """The trainer's config of a run."""
    run = dict(RUNS[name])
    after, rate = run.pop("after", None), run.pop("lr", OPTIMIZER["lr"])
    condition, *others = run["conditions"]
    if "references" not in run:
        condition = {"independent_condition": True, **condition}
    condition = {**condition, "name": file_name(name)}
    if after is not None:
        condition["init_lora"] = str(trained(after))
    output = {"output": str(WORK / name), "data": PICTURES, "optimizer": {**OPTIMIZER, "lr": rate}}
    return {**COMMON, **output, **run, "conditions": [condition, *others]}


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

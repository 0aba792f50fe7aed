"""The main job: starts the real ComfyUI, runs every example workflow, shows what came of it.

`make demo`, or `.venv/bin/python -m dev.workflows.demo`. Pictures, a contact sheet and the server's
log go to demo_output/. Where a checkpoint isn't at hand (put it into demo_output/base/models) the
demo model takes its place, and the table says so. SERVE=1 leaves the server running.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dev.host.prompts import ObjectInfo, Prompt, WorkflowError, combo_values, to_prompt
from dev.host.server import Client, Outcome, RunError, Server, ServerError
from dev.paths import ROOT
from dev.workflows.contact_sheet import Row, contact_sheet

WORKFLOWS = ROOT / "example_workflows"
PHOTOS = ROOT / "demo_model" / "photos"
DEMO_LORA = "omini2_demo_edges.safetensors"
DEMO_MODEL = "demo model"

# Stock loaders: output -> the demo model's output of the same type.
LOADERS = {
    "UNETLoader": {0: 0},
    "DualCLIPLoader": {0: 1},
    "VAELoader": {0: 2},
    "CheckpointLoaderSimple": {0: 0, 1: 1, 2: 2},
}
SET_STEPS = {"KSampler", "Flux2Scheduler"}
TRAINING_STEPS = 4  # in the place of minutes of training: enough to show that it runs


# --- prompts -----------------------------------------------------------------------------------


def missing_files(prompt: Prompt, object_info: ObjectInfo) -> list[str]:
    """The files named in loaders and Apply Omini2 LoRA that the server doesn't have."""
    missing = []
    for node in prompt.values():
        kind = node["class_type"]
        if kind not in LOADERS and kind != "Omini2ApplyLoRA":
            continue
        for name, entry in object_info[kind]["input"]["required"].items():
            offered, value = combo_values(entry), node["inputs"][name]
            # What another node gives is no name of a file yet.
            if offered is not None and not isinstance(value, list) and value not in offered:
                missing.append(value)
    return missing


def relink(prompt: Prompt, moved: dict[tuple[str, int], list[Any]]) -> None:
    """Changes where inputs come from: (node, output) -> [node, output]."""
    for node in prompt.values():
        for name, value in node["inputs"].items():
            while isinstance(value, list) and (value[0], value[1]) in moved:
                value = node["inputs"][name] = moved[value[0], value[1]]


def is_flux1(prompt: Prompt) -> bool:
    """Whether the demo model can take its model's place: FLUX.1 alone has two text encoders."""
    return not any(node["class_type"] == "CLIPLoader" for node in prompt.values())


def use_demo_model(prompt: Prompt) -> Prompt:
    """The same prompt with the demo model for the loaders and its LoRA for every LoRA."""
    prompt = copy.deepcopy(prompt)
    moved = {}
    for node_id, node in list(prompt.items()):
        for output, demo_output in LOADERS.get(node["class_type"], {}).items():
            moved[node_id, output] = ["demo_model", demo_output]
            prompt.pop(node_id, None)
        if node["class_type"] == "Omini2ApplyLoRA":
            node["inputs"]["lora_name"] = DEMO_LORA
    prompt["demo_model"] = {"class_type": "Omini2DemoModel", "inputs": {}}
    relink(prompt, moved)
    return prompt


def without_conditions(prompt: Prompt) -> Prompt:
    """The same prompt with every Omini2 node that changes the model taken out."""
    prompt = copy.deepcopy(prompt)
    moved = {}
    for node_id, node in list(prompt.items()):
        if node["class_type"].startswith("Omini2") and "model" in node["inputs"]:
            moved[node_id, 0] = node["inputs"]["model"]
            del prompt[node_id]
    relink(prompt, moved)
    return prompt


def only_one_step(prompt: Prompt) -> Prompt:
    """For a warm-up: loads all that the run needs, saves nothing."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if node["class_type"] in SET_STEPS:
            node["inputs"]["steps"] = 1
        if node["class_type"] == "SaveImage":
            node["class_type"] = "PreviewImage"
            del node["inputs"]["filename_prefix"]
    return prompt


def with_short_training(prompt: Prompt) -> Prompt:
    """The prompt with a few steps of training, under another name than a whole one's."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if node["class_type"] == "Omini2TrainLoRA":
            node["inputs"] |= {"steps": TRAINING_STEPS, "lora_name": "short_training"}
    return prompt


def with_condition_images(prompt: Prompt) -> tuple[Prompt, list[str]]:
    """The prompt with previews of what conditions and references are made of and of what an edit
    changed, and the previews' ids."""
    prompt = copy.deepcopy(prompt)
    added: Prompt = {}
    for node_id, node in prompt.items():
        kind, name = node["class_type"], f"shown_{node_id}"
        if kind == "Omini2ConditionEncode":
            added[name] = _preview(node["inputs"]["image"])
        elif kind == "ReferenceLatent":
            encoded = prompt[node["inputs"]["latent"][0]]
            if encoded["class_type"] == "VAEEncode":
                added[name] = _preview(encoded["inputs"]["pixels"])
        elif kind == "Omini2KeepUnchanged":
            mask = {"mask": [node_id, 1]}
            added[f"mask_{node_id}"] = {"class_type": "MaskToImage", "inputs": mask}
            added[name] = _preview([f"mask_{node_id}", 0])
    previews = [name for name in added if name.startswith("shown_")]
    return {**prompt, **added}, previews


def _preview(image: object) -> Prompt:
    return {"class_type": "PreviewImage", "inputs": {"images": image}}


def step_count(prompt: Prompt) -> int:
    """How many steps its samplers take; the host runs those that are alike once."""
    samplers = [n["inputs"] for n in prompt.values() if n["class_type"] in SET_STEPS]
    return sum({json.dumps(inputs): inputs["steps"] for inputs in samplers}.values())


# --- one workflow ------------------------------------------------------------------------------


@dataclass
class Result:
    """What one workflow gave."""

    name: str
    model: str
    steps: int
    seconds: float = 0.0
    seconds_without: float = 0.0  # none where its samplers ran with the others
    steps_without: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    conditions: list[Image.Image] = field(default_factory=list)
    caption: str = ""
    picture: Image.Image | None = None
    picture_without: Image.Image | None = None
    error: str = ""
    stand_in: bool = False

    @property
    def cells(self) -> list[str]:
        """This workflow's line in the table."""
        head = [self.name, self.model, str(self.steps)]
        if self.error:
            return [*head, "failed"]
        return [
            *head,
            f"{self.seconds:.2f}",
            f"{self.seconds / self.steps:.3f}",
            f"{self.seconds_without / self.steps_without:.3f}" if self.seconds_without else "-",
            "+".join(map(str, _tokens(self.figures))) or "0",
            f"{self.figures.get('kv_bytes', 0) / 1e6:.1f}",
            str(self.figures.get("refreshes", 0)),
        ]


COLUMNS = (
    "workflow", "model", "steps", "seconds", "s/step", "s/step without conditions", "tokens",
    "K/V MB", "refreshes",
)  # fmt: skip


async def run_workflow(
    client: Client, path: Path, info: ObjectInfo, output: Path, trains: bool = False
) -> Result:
    """Runs a workflow with and without its conditions; its error, if any, is in the result.

    Args:
        trains: as long as the workflow says; else a few steps.
    """
    result = Result(path.stem, "", 0)
    try:
        prompt = to_prompt(json.loads(path.read_text(encoding="utf-8")), info)
        if not trains:
            prompt = with_short_training(prompt)
        result.steps = step_count(prompt)
        result.model = model_name(prompt)
        if missing := missing_files(prompt, info):
            if not is_flux1(prompt):
                result.error = f"there is no {missing[0]}, and the demo model is a FLUX.1"
                return result
            prompt, result.model, result.stand_in = use_demo_model(prompt), DEMO_MODEL, True
        await run_both(client, prompt, result)
    except (RunError, WorkflowError) as error:
        result.error = str(error)
        return result
    save_images(result, output)
    return result


async def run_both(client: Client, prompt: Prompt, result: Result) -> None:
    """Fills in a result: pictures, times, figures."""
    plain = without_conditions(prompt)
    shown, condition_nodes = with_condition_images(prompt)
    warm_up = only_one_step(plain)
    result.steps_without = step_count(plain)
    total = step_count(warm_up) + result.steps + result.steps_without
    with tqdm(total=total, desc=result.name, unit="step", ncols=90) as bar:
        await client.run(warm_up, bar.update)
        ours = await client.run(shown, bar.update)
        without = await client.run(plain, bar.update)
    result.seconds, result.seconds_without = ours.sampling_seconds, without.sampling_seconds
    result.figures = ours.omini2[-1] if ours.omini2 else {}
    if any(node["class_type"] == "Omini2KeepUnchanged" for node in prompt.values()):
        result.caption = "reference, and white what was edited"
    for node in condition_nodes:
        result.conditions += await images_of(client, ours, node)
    result.picture = await picture_of(client, prompt, ours)
    result.picture_without = await picture_of(client, plain, without)


def model_name(prompt: Prompt) -> str:
    """What the prompt itself loads."""
    for node in prompt.values():
        if node["class_type"] == "Omini2DemoModel":
            return DEMO_MODEL
        for name in ("unet_name", "ckpt_name"):
            if name in node["inputs"]:
                return str(node["inputs"][name])
    return ""


async def images_of(client: Client, outcome: Outcome, node: str) -> list[Image.Image]:
    files = [await client.image(image) for image in outcome.images.get(node, [])]
    return [Image.open(BytesIO(file)).convert("RGB") for file in files]


async def picture_of(client: Client, prompt: Prompt, outcome: Outcome) -> Image.Image:
    """What SaveImage saved."""
    for node_id, node in prompt.items():
        if node["class_type"] == "SaveImage":
            images = await images_of(client, outcome, node_id)
            if images:
                return images[0]
    raise RunError("it saved no picture")


def save_images(result: Result, output: Path) -> None:
    for number, image in enumerate(result.conditions, 1):
        image.save(output / f"{result.name}.condition-{number}.png")
    result.picture.save(output / f"{result.name}.png")
    result.picture_without.save(output / f"{result.name}.without.png")


# --- all of them -------------------------------------------------------------------------------


def chosen(only: list[str], every: bool = False) -> list[Path]:
    """The workflow files: of these names, or all of them, or those made for the demo model."""
    files = {path.stem: path for path in sorted(WORKFLOWS.glob("*.json"))}
    unknown = [name for name in only if name not in files]
    if unknown:
        raise SystemExit(f"demo: no workflow {unknown[0]}; there are {', '.join(files)}")
    if only:
        return [files[name] for name in only]
    # The demo model draws its own small world: photos in the other workflows mean nothing to it.
    return [p for p in files.values() if every or "Omini2DemoModel" in p.read_text("utf-8")]


async def run_all(
    server: Server, paths: list[Path], output: Path, trains: bool = False
) -> list[Result]:
    """Runs workflows one after the other; `trains` as for :func:`run_workflow`."""
    async with Client(server) as client:
        info = await client.object_info()
        return [await run_workflow(client, path, info, output, trains) for path in paths]


def prepare_input(base: Path) -> None:
    """A real photo where the workflows' Load Image finds the host's example picture.

    The transparent part is what a user paints in the mask editor, for inpainting.
    """
    (base / "input").mkdir(parents=True, exist_ok=True)
    photo = Image.open(PHOTOS / "coffee.jpg").convert("RGBA")
    opaque = Image.new("L", photo.size, 255)
    opaque.paste(0, (190, 130, 400, 290))
    photo.putalpha(opaque)
    photo.save(base / "input" / "example.png")


def table(rows: list[list[str]]) -> str:
    """Columns aligned: text left, numbers right."""
    filled = [[*row, *[""] * (len(COLUMNS) - len(row))] for row in (list(COLUMNS), *rows)]
    widths = [max(map(len, column)) for column in zip(*filled, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in filled
    )


def sheet_row(result: Result) -> Row:
    figures = result.figures
    tokens = " + ".join(map(str, _tokens(figures)))
    what = "reference" if figures.get("references") else "condition"
    shown = {0: f"no {what} image in the graph", 1: what}
    without = f"without, {result.seconds_without:.2f} s"
    if not result.seconds_without:
        without = "without, made in the same run"
    elif result.steps_without != result.steps:
        without += f" ({result.steps_without} steps)"
    return Row(
        title=result.name,
        lines=[
            result.model,
            f"{result.steps} steps",
            *([f"{tokens} {what} tokens"] if tokens else []),
            f"K/V {figures.get('kv_bytes', 0) / 1e6:.1f} MB, computed {_times(figures)}",
        ],
        cells=[
            (result.conditions, result.caption or shown.get(len(result.conditions), f"{what}s")),
            ([result.picture], f"with Omini2, {result.seconds:.2f} s"),
            ([result.picture_without], without),
        ],
    )


def _tokens(figures: dict[str, Any]) -> list[int]:
    """Of the conditions, or of all references."""
    references = figures.get("references")
    return [references["tokens"]] if references else figures.get("tokens", [])


def _times(figures: dict[str, Any]) -> str:
    count = figures.get("refreshes", 0)
    return "once" if count == 1 else f"{count} times"


def report(results: list[Result], output: Path) -> int:
    """Prints the table and writes the contact sheet; returns the exit code."""
    print("\n" + table([result.cells for result in results]) + "\n", flush=True)
    if any(result.stand_in for result in results):
        print(
            f"{DEMO_MODEL}: the tiny model that comes with the extension, also in place of files "
            "that are not in base/models. It knows drawn shapes only, so a workflow for another "
            "model shows that it runs, not what it draws."
        )
    good = [result for result in results if not result.error]
    if good:
        contact_sheet([sheet_row(result) for result in good]).save(output / "contact_sheet.png")
        print(f"pictures: {output / 'contact_sheet.png'}", flush=True)
    for result in results:
        if result.error:
            print(f"demo: {result.name} failed: {result.error}", file=sys.stderr, flush=True)
    return 1 if len(good) < len(results) else 0


def serve(server: Server) -> None:
    """Leaves the server to the user until Ctrl-C or its own end."""
    try:
        print(f"ComfyUI stays at {server.address} until you press Ctrl-C.", flush=True)
        while True:
            server.check()
            time.sleep(0.5)
    except KeyboardInterrupt:
        print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these workflows")
    parser.add_argument("--all", action="store_true", help="also those for other models")
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output")
    parser.add_argument("--gpu", action="store_true", help="let the server use the GPU")
    args = parser.parse_args()
    paths, output = chosen(args.only, args.all), args.output.resolve()
    base = output / "base"
    prepare_input(base)
    # A polite kill is to stop the server, too; and a shell that starts us in the background has
    # Ctrl-C's signal ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        serving = os.environ.get("SERVE", "") not in ("", "0")
        with Server(base, output / "server.log", args.gpu, previews=serving) as server:
            print(f"ComfyUI at {server.address} (log: {server.log})", flush=True)
            code = report(asyncio.run(run_all(server, paths, output)), output)
            if serving:
                serve(server)
            return code
    except ServerError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

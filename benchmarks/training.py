"""What a LoRA steers that Omini2 Train LoRA has trained: `python -m benchmarks.training`.

Trains as the template train-demo-model does, once a seed, then draws held-out scenes of the demo
model's world from their blurred pictures and the words, with the LoRA and without, and measures how
well the edges of what is drawn meet the scenes' own (edge F1, a pixel of tolerance).
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import host, metrics
from dev.paths import ROOT
from dev.workflows.graph import SPECS

TEMPLATE = ROOT / "example_workflows" / "train-demo-model.json"
NODE = "Omini2TrainLoRA"
STEPS, GUIDANCE, SIDE = 12, 3.5, 256


def template_values() -> dict[str, Any]:
    """The inputs of the template's Omini2 Train LoRA."""
    graph = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    [node] = (node for node in graph["nodes"] if node["type"] == NODE)
    values = dict(zip(SPECS[NODE].widgets, node["widgets_values"], strict=True))
    del values["control_after_generate"]
    return values


def main() -> None:
    """Command line."""
    of = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    of.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings")
    of.add_argument("--scenes", type=int, default=12, help="held-out scenes for each")
    of.add_argument("--set", nargs="+", default=[], metavar="INPUT=VALUE", help="other inputs")
    of.add_argument("--keep", type=Path, help="a folder for LoRAs and logs; else they are dropped")
    options = of.parse_args()
    host.start("cpu")
    with tempfile.TemporaryDirectory() as folder:
        kept = (options.keep or Path(folder)).resolve()
        rows = _measured(kept, template_values(), options)
    print("| seed | minutes | loss | F1 with | F1 without |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(host.machine())


def _measured(kept: Path, values: dict[str, Any], options: argparse.Namespace) -> list[list[str]]:
    import folder_paths

    import omini2_extension.nodes as nodes

    folder_paths.set_output_directory(str(kept))
    (kept / "loras").mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path("loras", str(kept / "loras"), is_default=True)
    for name, text in (change.split("=") for change in options.set):
        values[name] = type(values[name])(text)
    rows = []
    for seed in options.seeds:
        began = time.monotonic()
        with torch.inference_mode():
            model, clip, vae = nodes.DemoModel.execute().args
            named = {"seed": seed, "lora_name": f"seed_{seed}"}
            nodes.TrainLora.execute(clip, vae, **{**values, **named})
            minutes = (time.monotonic() - began) / 60
            log = (kept / "omini2_training" / f"seed_{seed}" / "loss.jsonl").read_text()
            losses = [json.loads(line)["loss"] for line in log.splitlines()]
            parts = f"seed_{seed}", model, clip, vae
            found = [_f1(values["condition"], i, *parts) for i in range(options.scenes)]
        means = [statistics.mean(each) for each in zip(*found, strict=True)]
        ends = [statistics.mean(part) for part in (losses[:50], losses[-50:])]
        rows.append(
            [
                f"{seed}",
                f"{minutes:.1f}",
                "{:.3f} to {:.3f}".format(*ends),
                *(f"{m:.2f}" for m in means),
            ]
        )
        print(rows[-1], flush=True)
    return rows


def _f1(kind: str, index: int, lora: str, model: Any, clip: Any, vae: Any) -> tuple[float, float]:
    """Edge F1 of a held-out scene drawn with the LoRA and without."""
    import omini2_extension.nodes as nodes
    from benchmarks.study.conditions import condition_images, truth

    scene = truth(index, things=2)
    task = {"canny": "edges", "grey": "colouring", "blur": "deblurring"}[kind]
    image = condition_images(task, [scene])
    condition = nodes.ConditionEncode.execute(image, vae, "aligned", 0, 0, 1.0)[0]
    settings = f"{lora}.safetensors", 1.0, 1.0, "auto", 0.0, 1.0
    steered = nodes.ApplyLora.execute(model, condition, *settings)[0]
    wanted = metrics.edges(torch.from_numpy(scene.picture)[None])[0]
    pictures = (_drawn(each, scene, index, clip, vae) for each in (steered, model))
    one, other = (metrics.edge_f1(metrics.edges(p)[0], wanted) for p in pictures)
    return one, other


def _drawn(model: Any, scene: Any, seed: int, clip: Any, vae: Any) -> torch.Tensor:
    """(1, 256, 256, 3) by the stock KSampler's path."""
    import comfy.sample

    from dev.demo_model import scenes

    tokens = clip.tokenize(scenes.full_caption(scene.scene))
    text, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    prompt = [[text, {"pooled_output": pooled, "guidance": GUIDANCE}]]
    latent = torch.zeros(1, 16, SIDE // 8, SIDE // 8)
    noise = comfy.sample.prepare_noise(latent, seed)
    latent = comfy.sample.sample(
        model,
        noise,
        STEPS,
        1.0,
        "euler",
        "simple",
        prompt,
        prompt,
        latent,
        seed=seed,
        disable_pbar=True,
    )
    return vae.decode(latent)


if __name__ == "__main__":
    main()

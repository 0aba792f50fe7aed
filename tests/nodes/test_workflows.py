"""The example workflows: what the builder gives, and what the host's own server takes."""

import asyncio
import copy
import importlib.util
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
from PIL import Image

from dev import random_lora
from dev.docs import help_pictures, thumbnails
from dev.host.prompts import (
    EDITOR_ONLY,
    ObjectInfo,
    WorkflowError,
    combo_values,
    is_widget,
    to_prompt,
    widgets,
)
from dev.host.server import Client, Server, ServerError, refusal
from dev.paths import ROOT
from dev.workflows import demo, files, make
from dev.workflows.graph import SPECS, TITLE, Graph
from omini2_extension.nodes.demo_image import DemoImage
from omini2_extension.omini2_core.demo import files as demo_files
from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.lora import presets

FILES = sorted((ROOT / "example_workflows").glob("*.json"))
MODEL_FILES = {
    *("unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name", "lora_name", "ckpt_name"),
    "cache_name",
}
TRY_IT = "try-it-without-a-checkpoint"
# Whose model only newer hosts have: there its values are among those that they offer.
NEWER = {"krea2-edit-lora": ("CLIPLoader", "type", "krea2")}

pytestmark = pytest.mark.xdist_group("server")


def load(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))


# --- the files ---------------------------------------------------------------------------------


def test_files_are_what_the_builder_gives() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in FILES}
    assert files == make.make_all(), "run python -m dev.workflows.make"


def test_builder_knows_the_nodes_as_they_are(info: ObjectInfo) -> None:
    for kind, spec in SPECS.items():
        if kind in EDITOR_ONLY:
            continue
        sections = info[kind]["input"]
        inputs = {**sections.get("required", {}), **sections.get("optional", {})}
        assert all(inputs[name][0] == type_ for name, type_ in spec.inputs.items()), kind
        # Newer hosts may have more outputs behind those that we know.
        assert info[kind]["output"][: len(spec.outputs)] == list(spec.outputs.values()), kind
        known = [w.name for w in widgets(info[kind])]
        ours = [w if w in inputs else None for w in spec.widgets]
        assert ours == known[: len(ours)], kind


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_link_and_widget_is_valid(path: Path, info: ObjectInfo) -> None:
    prompt = to_prompt(json.loads(path.read_text(encoding="utf-8")), info)
    assert demo.step_count(prompt) > 0
    if path.stem in NEWER:
        kind, name, value = NEWER[path.stem]
        if value not in combo_values(info[kind]["input"]["required"][name]):
            pytest.skip("this host doesn't know its model")
    for node in prompt.values():
        sections = info[node["class_type"]]["input"]
        inputs = {**sections.get("required", {}), **sections.get("optional", {})}
        assert set(sections.get("required", {})) <= set(node["inputs"]) <= set(inputs)
        for name, value in node["inputs"].items():
            kind, *options = inputs[name]
            if isinstance(value, list):
                source = info[prompt[value[0]]["class_type"]]
                assert kind in (source["output"][value[1]], "*")
                continue
            offered = combo_values(inputs[name])
            if offered is not None:
                assert value in offered or name in MODEL_FILES
            elif kind in ("INT", "FLOAT"):
                assert options[0].get("min", value) <= value <= options[0].get("max", value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_says_what_it_needs_and_which_package_its_nodes_are_from(path: Path) -> None:
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    text = " ".join(n["widgets_values"][0] for n in nodes if n["type"] == "MarkdownNote")
    for node in nodes:
        names = [v for v in node["widgets_values"] if str(v).endswith(".safetensors")]
        assert all(name in text or name.startswith("omini2_demo") for name in names)
        if node["type"] not in EDITOR_ONLY:
            assert node["properties"]["cnr_id"] in ("comfy-core", "comfyui-omini2")
        if node["type"] in ("KSampler", "RandomNoise"):
            assert node["widgets_values"][1] == "fixed"


PAGE_ALONE = {"subject_depth_union.safetensors"}  # its name there isn't known


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_files_are_linked_where_the_editor_looks_and_in_the_note(path: Path) -> None:
    """As ComfyUI's own templates have them: it offers to fetch those that aren't there."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    notes = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    text = " ".join(node["widgets_values"][0] for node in notes)
    named = [
        (node, value)
        for node in graph["nodes"]
        for value in node["widgets_values"]
        if re.fullmatch(r"\S+\.safetensors", str(value)) and node["type"] != "Omini2LoadCache"
    ]
    for node, name in named:
        if name.startswith("omini2_demo"):
            continue
        assert name in text
        linked = {each["name"]: each for each in node["properties"].get("models", [])}
        assert (name in linked) != (name in PAGE_ALONE)
        if name in linked:
            found = linked[name]
            assert found["directory"] in folder_paths.folder_names_and_paths
            url = (
                r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/(\S+/)?[\w.-]+\.safetensors"
            )
            assert re.fullmatch(url, found["url"]) and f"[{name}]({found['url']})" in text
            there = found["url"].rpartition("/")[2]
            assert there == name or f"called *{there}* there: save it as **{name}**" in text
    models = {each["name"] for n in graph["nodes"] for each in n["properties"].get("models", [])}
    assert models <= {name for _, name in named}
    demo_model = any(node["type"] == "Omini2DemoModel" for node in graph["nodes"])
    assert bool(models) != demo_model


CORE = {  # by ComfyUI's own templates
    "https://huggingface.co/Comfy-Org/flux1-dev/resolve/main/flux1-dev-fp8.safetensors",
    "https://huggingface.co/Comfy-Org/flux1-schnell/resolve/main/flux1-schnell-fp8.safetensors",
}


def test_base_models_are_linked_as_the_hosts_own_templates_link_them() -> None:
    folder = importlib.util.find_spec("comfyui_workflow_templates").submodule_search_locations[0]
    theirs = "".join(
        path.read_text(encoding="utf-8")
        for path in Path(folder).parent.glob("comfyui_workflow_templates*/**/*.json")
    )
    ours = {f.url for f in files.BY_NAME.values() if f.folder != "loras"}
    # What newer hosts' templates alone have is held to those.
    known = {url for url in ours if url in theirs}
    assert CORE <= known and len(known) >= 8


def test_condition_loras_are_linked_where_the_table_of_presets_says_they_are() -> None:
    linked = {file.name: file.url for file in files.condition_loras()}
    page = "https://huggingface.co"
    assert linked["canny.safetensors"] == (
        f"{page}/Yuanshi/OminiControl/resolve/main/experimental/canny.safetensors"
    )
    assert linked["easycontrol_ghibli.safetensors"] == (
        f"{page}/Xiaojiu-Z/EasyControl/resolve/main/models/Ghibli.safetensors"
    )
    assert linked["OmniConsistency.safetensors"] == (
        f"{page}/showlab/OmniConsistency/resolve/main/OmniConsistency.safetensors"
    )
    for name, url in linked.items():  # the nodes know each by the name that it gets here
        sources = {usage.source.partition(",")[0] for usage in presets.named(name)}
        assert any(url.startswith(f"{page}/{source}/") for source in sources), name


@pytest.mark.parametrize(("name", "most"), [("edges", 13), ("inpainting", 15)])
def test_the_simplest_jobs_take_few_nodes(name: str, most: int) -> None:
    """All but the note, the look at the condition included."""
    kinds = [node["type"] for node in load(name)["nodes"]]
    assert len([kind for kind in kinds if kind != "MarkdownNote"]) <= most
    assert "PreviewImage" in kinds


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_overlaps(path: Path) -> None:
    graph = json.loads(path.read_text(encoding="utf-8"))
    nodes = [(*n["pos"], *n["size"]) for n in graph["nodes"]]
    boxes = [(x, y - TITLE, w, h + TITLE) for x, y, w, h in nodes]
    for one, other in [*combinations(boxes, 2), *combinations(_bounds(graph), 2)]:
        assert not _overlap(one, other)
    for box in boxes:  # a node is wholly in its group, or in none
        for group in _bounds(graph):
            inside = group[0] < box[0] and box[0] + box[2] < group[0] + group[2]
            assert inside or not _overlap(box, group)


def _bounds(graph: dict[str, Any]) -> list[tuple[int, ...]]:
    return [tuple(group["bounding"]) for group in graph["groups"]]


def _overlap(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(
        one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2]
        for axis in (0, 1)
    )


def test_every_template_has_a_thumbnail() -> None:
    pictures = {path.stem: path for path in (ROOT / "example_workflows").glob("*.jpg")}
    assert set(pictures) == {path.stem for path in FILES}, "run python -m dev.docs.thumbnails"
    for path in pictures.values():
        assert path.stat().st_size < 40_000
        with Image.open(path) as image:
            assert image.size == (thumbnails.SIDE,) * 2
    assert sum(path.stat().st_size for path in pictures.values()) < 700_000


def test_a_thumbnail_is_of_the_run_that_is_most_like_its_template() -> None:
    runs = {path.stem for path in demo.chosen([])}
    shown = {path.stem: thumbnails.shown_run(path.stem, runs) for path in FILES}
    assert all(shown[name] == name for name in runs)
    assert shown["edges"] == TRY_IT and shown["colouring"] == "colouring-demo-model"
    drawn = {name for name, run in shown.items() if run is None}
    families = ("easycontrol", "omniconsistency", "ieap", "unicombine")
    others = {"art-style", *thumbnails.MODELS}
    assert all(name.startswith(families) or name in others for name in drawn)
    assert set(thumbnails.MODELS) <= drawn


def test_a_nodes_neighbourhood_is_a_graph_of_its_own() -> None:
    graph = load(TRY_IT)
    lora = by_type(graph, "Omini2ApplyLoRA")
    part = help_pictures.neighbourhood(graph, lora["id"])
    places = {node["type"]: node["pos"][0] for node in part["nodes"]}
    assert set(places) == {
        "Omini2DemoModel",
        "Omini2ConditionEncode",
        "Omini2ApplyLoRA",
        "Omini2ConditionCache",
    }
    assert places["Omini2DemoModel"] < places["Omini2ApplyLoRA"] == 0
    assert places["Omini2ConditionCache"] > lora["size"][0]
    links = {link[0] for link in part["links"]}
    used = {slot["link"] for node in part["nodes"] for slot in node["inputs"]} - {None}
    given = {link for n in part["nodes"] for slot in n["outputs"] for link in slot["links"]}
    assert used == given == links and len(links) == 3
    assert graph == load(TRY_IT)


def test_builder_rejects_what_does_not_fit() -> None:
    graph = Graph("wrong")
    vae = graph.add("VAELoader", "ae.safetensors")
    with pytest.raises(ValueError, match="VAE does not fit FluxGuidance"):
        graph.add("FluxGuidance", 3.5, conditioning=vae)
    with pytest.raises(ValueError, match="has the widgets"):
        graph.add("FluxGuidance")


# --- graph files to prompts --------------------------------------------------------------------


def by_type(graph: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(node for node in graph["nodes"] if node["type"] == kind)


def test_values_after_a_seed_are_in_their_places(info: ObjectInfo) -> None:
    graph = load(TRY_IT)
    prompt = to_prompt(graph, info)
    inputs = prompt[str(by_type(graph, "KSampler")["id"])]["inputs"]
    assert inputs["seed"] == 1 and inputs["steps"] == 12 and inputs["cfg"] == 1.0
    assert (inputs["sampler_name"], inputs["scheduler"]) == ("euler", "simple")
    assert inputs["denoise"] == 1.0 and len(inputs["model"]) == 2
    assert not any(node["class_type"] == "MarkdownNote" for node in prompt.values())


def test_upload_button_is_no_input(info: ObjectInfo) -> None:
    graph = load("edges")
    node = to_prompt(graph, info)[str(by_type(graph, "LoadImage")["id"])]
    assert node["inputs"] == {"image": "example.png"}


def test_missing_values_get_their_defaults(info: ObjectInfo) -> None:
    graph = load(TRY_IT)
    node = by_type(graph, "Omini2ApplyLoRA")
    node["widgets_values"] = node["widgets_values"][:2]
    inputs = to_prompt(graph, info)[str(node["id"])]["inputs"]
    assert (inputs["condition_scale"], inputs["attention"], inputs["end_percent"]) == (1, "auto", 1)


def test_bypassed_and_muted_nodes(info: ObjectInfo) -> None:
    graph = load(TRY_IT)
    cache, lora = by_type(graph, "Omini2ConditionCache"), by_type(graph, "Omini2ApplyLoRA")
    sampler, canny = str(by_type(graph, "KSampler")["id"]), by_type(graph, "Canny")
    cache["mode"] = 4
    prompt = to_prompt(graph, info)
    assert str(cache["id"]) not in prompt
    assert prompt[sampler]["inputs"]["model"] == [str(lora["id"]), 0]
    lora["mode"] = 4
    assert to_prompt(graph, info)[sampler]["inputs"]["model"][0] == str(
        by_type(graph, "Omini2DemoModel")["id"]
    )
    canny["mode"] = 2
    prompt = to_prompt(graph, info)
    assert str(canny["id"]) not in prompt
    assert "images" not in prompt[str(by_type(graph, "PreviewImage")["id"])]["inputs"]


def test_reroutes_and_primitives_are_followed(info: ObjectInfo) -> None:
    graph = load(TRY_IT)
    sampler, link = by_type(graph, "KSampler"), len(graph["links"]) + 1
    source = graph["links"][sampler["inputs"][0]["link"] - 1]
    graph["nodes"] += [
        {"id": 90, "type": "Reroute", "mode": 0, "inputs": [{"name": "", "link": source[0]}]},
        {"id": 91, "type": "PrimitiveNode", "mode": 0, "widgets_values": [77, "fixed"]},
    ]
    graph["links"] += [
        [link, 90, 0, sampler["id"], 0, "MODEL"],
        [link + 1, 91, 0, sampler["id"], 4, "INT"],
    ]
    sampler["inputs"][0]["link"] = link
    sampler["inputs"].append({"name": "seed", "type": "INT", "link": link + 1})
    inputs = to_prompt(graph, info)[str(sampler["id"])]["inputs"]
    assert inputs["model"] == [str(source[1]), 0] and inputs["seed"] == 77


def test_unknown_node_is_named(info: ObjectInfo) -> None:
    graph = load(TRY_IT)
    by_type(graph, "Canny")["type"] = "Cannier"
    with pytest.raises(WorkflowError, match="no node Cannier"):
        to_prompt(graph, info)


def test_forced_inputs_are_no_widgets() -> None:
    assert is_widget("INT", {}) and is_widget(["a"], {}) and not is_widget("MODEL", {})
    assert not is_widget("INT", {"forceInput": True})


# --- the demo's prompts ------------------------------------------------------------------------


def test_demo_model_stands_in_for_missing_files(info: ObjectInfo) -> None:
    prompt = to_prompt(load("two-conditions"), info)
    before = copy.deepcopy(prompt)
    missing = demo.missing_files(prompt, info)
    assert {"flux1-dev-fp8.safetensors", "canny.safetensors"} <= set(missing)
    changed = demo.use_demo_model(prompt)
    assert prompt == before
    assert demo.missing_files(changed, info) == []
    assert demo.missing_files(to_prompt(load(TRY_IT), info), info) == []
    kinds = [node["class_type"] for node in changed.values()]
    assert not set(kinds) & set(demo.LOADERS) and kinds.count("Omini2DemoModel") == 1
    links = [v for n in changed.values() for v in n["inputs"].values() if isinstance(v, list)]
    assert all(link[0] in changed for link in links)


def test_demo_model_stands_in_for_flux1_only(server: Server, tmp_path: Path) -> None:
    paths = demo.chosen(["flux2-klein-9b-kv"])
    (result,) = asyncio.run(demo.run_all(server, paths, tmp_path))
    assert result.error.startswith("there is no flux-2-klein-9b-kv-fp8.safetensors")
    assert result.steps == 4


def test_conditions_taken_out(info: ObjectInfo) -> None:
    graph = load("two-conditions")
    prompt = demo.without_conditions(to_prompt(graph, info))
    model = prompt[str(by_type(graph, "KSampler")["id"])]["inputs"]["model"]
    assert model == [str(by_type(graph, "CheckpointLoaderSimple")["id"]), 0]
    assert "Omini2ApplyLoRA" not in [node["class_type"] for node in prompt.values()]


def test_samplers_that_are_alike_without_conditions_run_once(info: ObjectInfo) -> None:
    prompt = to_prompt(load("reuse-and-compact-tokens-compared-demo-model"), info)
    assert demo.step_count(prompt) == 4 * 12
    assert demo.step_count(demo.without_conditions(prompt)) == 12


def test_failing_workflow_gives_the_servers_sentence(server: Server, tmp_path: Path) -> None:
    graph = load(TRY_IT)
    by_type(graph, "Omini2ApplyLoRA")["widgets_values"][4:] = [0.8, 0.2]
    late = tmp_path / "late.json"
    late.write_text(json.dumps(graph))
    by_type(graph, "Omini2ApplyLoRA")["widgets_values"][4:] = [0.0, 7.0]
    refused = tmp_path / "refused.json"
    refused.write_text(json.dumps(graph))
    results = asyncio.run(demo.run_all(server, [late, refused], tmp_path))
    assert "start_percent: 0.8 is not below end_percent" in results[0].error
    assert "end_percent" in results[1].error and "max" in results[1].error
    assert demo.report(results, tmp_path) == 1


def test_inpainting_leaves_every_other_pixel_as_it_was(server: Server, info: ObjectInfo) -> None:
    """To the last bit of what is saved; the hole is a whole number of tokens."""
    prompt = to_prompt(load("inpainting-demo-model"), info)
    kinds = {node["class_type"]: key for key, node in prompt.items()}
    prompt[kinds["KSampler"]]["inputs"]["steps"] = 2
    encoded = {"images": [kinds["Omini2ConditionEncode"], 1]}
    prompt["encoded"] = {"class_type": "PreviewImage", "inputs": encoded}

    async def run() -> list[Image.Image]:
        async with Client(server) as client:
            outcome = await client.run(prompt, lambda: None)
            keys = "encoded", kinds["SaveImage"]
            return [image for key in keys for image in await demo.images_of(client, outcome, key)]

    before, after = map(np.asarray, asyncio.run(run()))
    differs = (before != after).any(-1)
    assert before.shape == (256, 256, 3) and differs[128:256, 64:176].mean() > 0.5
    differs[128:256, 64:176] = False
    assert not differs.any()


def test_refusal_without_node_errors() -> None:
    error = {"error": {"message": "Prompt has no outputs", "details": ""}, "node_errors": {}}
    assert refusal(error) == "Prompt has no outputs"


def test_server_that_dies_shows_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [demo.sys.executable, "-c", "print('boom'); raise SystemExit(3)"]
    monkeypatch.setattr(Server, "_command", lambda self: command)
    with pytest.raises(ServerError, match=r"exit code 3\.(.|\n)*server\.log(.|\n)*boom"):
        Server(tmp_path / "base", tmp_path / "server.log").__enter__()


# --- what ships with it ------------------------------------------------------------------------


def test_photos_are_512_and_small() -> None:
    assert len(demo_files.photos()) >= 2
    for name, path in demo_files.photos().items():
        image = DemoImage.execute(name).args[0]
        assert image.shape == (1, 512, 512, 3) and 0 <= image.min() < image.max() <= 1
        assert path.stat().st_size < 80_000
    with pytest.raises(Omini2Error, match="there is no"):
        DemoImage.execute("../photos/cat")


def test_demo_lora_is_listed_and_made_for_the_demo_model(info: ObjectInfo, tmp_path: Path) -> None:
    offered = combo_values(info["Omini2ApplyLoRA"]["input"]["required"]["lora_name"])
    assert demo.DEMO_LORA in offered
    for name in ("a", "b"):
        random_lora.make_lora(tmp_path / name, seed=1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

"""What shared workflows depend on stays, unless a change of it is meant."""

import json
from pathlib import Path
from typing import Any

import pytest

from dev.host.prompts import to_prompt, widgets
from dev.paths import ROOT
from dev.quality import contract
from omini2_extension.nodes import NODES

EARLIER = sorted((ROOT / "tests" / "workflows_of_earlier_releases").iterdir())
FILES = [path for release in EARLIER for path in sorted(release.glob("*.json"))]
OLD_CONTRACT = "contract.json"
WORKFLOWS = [path for path in FILES if path.name != OLD_CONTRACT]


@pytest.fixture(scope="module")
def now() -> dict[str, Any]:
    return contract.contracts()


def test_the_nodes_are_as_the_snapshot_says(now: dict[str, Any]) -> None:
    assert json.loads(contract.FILE.read_text(encoding="utf-8")) == now, (
        "a node's contract has changed: see 'Changing a node' in CONTRIBUTING.md"
    )


def test_the_snapshot_does_not_depend_on_the_user_s_files() -> None:
    text = contract.FILE.read_text(encoding="utf-8")
    assert ".safetensors" not in text
    assert {name for name in contract.THEIR_FILES if f'"{name}": [' in text} == contract.THEIR_FILES


# --- earlier releases --------------------------------------------------------------------------


@pytest.mark.parametrize("release", EARLIER, ids=lambda path: path.name)
def test_all_that_a_release_had_is_still_there(release: Path, now: dict[str, Any]) -> None:
    before = json.loads((release / OLD_CONTRACT).read_text(encoding="utf-8"))
    assert problems(before, now) == []


def problems(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a workflow made for the nodes of `before` can meet with those of `now`."""
    found = []
    for node_id, old in before.items():
        if node_id not in now:
            found.append(f"{node_id} is gone")
            continue
        new = now[node_id]
        if new["output"][: len(old["output"])] != old["output"]:
            found.append(f"{node_id}: its outputs have changed")
        found += [f"{node_id}.{problem}" for problem in _inputs(old["input"], new["input"])]
    return found


def _inputs(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    found = []
    all_old = {k: v for section in old.values() for k, v in section.items()}
    all_new = {k: v for section in new.values() for k, v in section.items()}
    for name, (kind, options) in all_old.items():
        if name not in all_new:
            found.append(f"{name} is gone")
            continue
        now_kind, now_options = all_new[name]
        if kind != now_kind:
            found.append(f"{name} is {now_kind} instead of {kind}")
        if isinstance(options.get("options"), list):
            gone = set(options["options"]) - set(now_options["options"])
            found += [f"{name} no longer offers {choice}" for choice in sorted(gone)]
        if now_options.get("min", 0) > options.get("min", 0):
            found.append(f"{name} has a higher minimum")
        if now_options.get("max", 0) < options.get("max", 0):
            found.append(f"{name} has a lower maximum")
    # A prompt of an old script gives what was required then.
    for name in set(new.get("required", {})) - set(old.get("required", {})):
        found.append(f"{name} is required now")
    order = [name for name in all_new if name in all_old]
    if order != list(all_old) or list(all_new)[: len(all_old)] != list(all_old):
        found.append("inputs are in another order, and files keep widgets' values by it")
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_its_workflows_open(path: Path) -> None:
    infos = {info["name"]: info for info in (node.GET_NODE_INFO_V1() for node in NODES)}
    graph = json.loads(path.read_text(encoding="utf-8"))
    ours = [node for node in graph["nodes"] if node["type"].startswith("Omini2")]
    assert ours
    for node in ours:
        info = infos[node["type"]]
        known = [w for w in widgets(info)]
        sections = info["input"]
        inputs = {**sections["required"], **sections.get("optional", {})}
        assert len(node["widgets_values"]) <= len(known)
        for slot in node["inputs"]:
            assert inputs[slot["name"]][0] == slot["type"]
        for slot, kind in zip(node["outputs"], info["output"], strict=False):
            assert slot["type"] == kind
        for widget, value in zip(known, node["widgets_values"], strict=False):
            assert _fits(widget.name, value, *inputs[widget.name]), (node["type"], widget.name)


def _fits(name: str, value: Any, kind: str, options: dict[str, Any]) -> bool:
    if kind == "COMBO":
        return name in contract.THEIR_FILES or value in options["options"]
    if kind in ("INT", "FLOAT"):
        return options["min"] <= value <= options["max"]
    return isinstance(value, {"BOOLEAN": bool, "STRING": str}[kind])


def test_their_prompts_can_be_made(now: dict[str, Any]) -> None:
    infos = {info["name"]: info for info in (node.GET_NODE_INFO_V1() for node in NODES)}
    for path in WORKFLOWS:
        graph = json.loads(path.read_text(encoding="utf-8"))
        graph["nodes"] = [n for n in graph["nodes"] if n["type"] in infos]
        links = {n["id"] for n in graph["nodes"]}
        for node in graph["nodes"]:
            for slot in node["inputs"]:
                source = next((li[1] for li in graph["links"] if li[0] == slot["link"]), None)
                if source not in links:
                    slot["link"] = None
        prompt = to_prompt(graph, infos)
        for node in prompt.values():
            wanted = set(infos[node["class_type"]]["input"]["required"])
            sockets = {
                n
                for n, e in infos[node["class_type"]]["input"]["required"].items()
                if e[0] not in ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")
            }
            assert wanted - sockets <= set(node["inputs"])


def test_a_change_that_breaks_workflows_is_seen(now: dict[str, Any]) -> None:
    def changed(edit: Any) -> list[str]:
        new = json.loads(json.dumps(now))
        edit(new)
        return problems(now, new)

    encode, lora = "Omini2ConditionEncode", "Omini2ApplyLoRA"
    assert changed(lambda new: None) == []
    assert changed(lambda new: new.pop(lora)) == [f"{lora} is gone"]
    assert changed(lambda new: new[lora]["output"].clear())
    required = [new for new in now[encode]["input"]["required"]]
    for name in required:
        assert changed(lambda new, name=name: new[encode]["input"]["required"].pop(name))
    assert changed(lambda new: new[encode]["input"]["required"].update(more=["INT", {}]))
    assert not changed(lambda new: new[encode]["input"]["optional"].update(more=["INT", {}]))
    placement = "placement"
    assert changed(
        lambda new: new[encode]["input"]["required"][placement][1]["options"].remove("fit")
    )
    assert changed(lambda new: new[encode]["input"]["optional"]["size"][1].update(max=64))

"""What a run tells the editor: figures for the nodes, progress, warnings."""

import json
import logging
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import comfy_execution.progress
import pytest
import torch
from comfy_api.latest import io
from comfy_execution.utils import CurrentNodeContext
from tiny import (
    apply,
    compact,
    flux_config,
    make_model,
    pixel_mask,
    random_condition,
    recorded_runs,
    sample,
)

from omini2_extension import nodes
from omini2_extension.omini2_core import errors
from omini2_extension.omini2_core.host.attach import get_setup
from omini2_extension.omini2_core.host.figures import MAP_SIDE, branch_figures, kept_map


class Editor:
    """The server's side of one editor: keeps what is sent to it."""

    client_id: str | None = "editor"

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def send_sync(self, event: str, data: dict[str, Any], client: str) -> None:
        assert client == self.client_id
        self.sent.append((event, json.loads(json.dumps(data))))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [data for name, data in self.sent if name == event]


@pytest.fixture
def editor(monkeypatch: pytest.MonkeyPatch) -> Editor:
    editor = Editor()
    module = ModuleType("server")
    module.PromptServer = SimpleNamespace(instance=editor)
    monkeypatch.setitem(sys.modules, "server", module)
    return editor


class Bars(comfy_execution.progress.ProgressHandler):
    """Keeps every bar's movements."""

    def __init__(self) -> None:
        super().__init__("test")
        self.moves: list[tuple[str, float, float]] = []
        self.finished: list[str] = []

    def update_handler(
        self, node_id: str, value: float, max_value: float, *_: Any, **__: Any
    ) -> None:
        self.moves.append((node_id, value, max_value))

    def finish_handler(self, node_id: str, *_: Any) -> None:
        self.finished.append(node_id)


@pytest.fixture
def bars() -> Iterator[Bars]:
    bars = Bars()
    comfy_execution.progress.add_progress_handler(bars)
    yield bars
    comfy_execution.progress.get_progress_state().unregister_handler(bars.name)


@pytest.fixture
def model():
    return make_model(flux_config(True))


def named(node: type[io.ComfyNode], name: str) -> type[io.ComfyNode]:
    """A node as the host runs it in a graph."""
    hidden = {io.Hidden.unique_id: name}
    # Newer hosts want them one level deeper.
    return node.PREPARE_CLASS_CLONE({**hidden, "hidden_inputs": hidden})


def graph(
    model, lora: str, attention: str = "joint", scale: float = 1.0, ids: str = "12:", condition=None
):
    """Apply Omini2 LoRA and Condition Cache in a subgraph."""
    condition = condition or random_condition(4, 6)
    model = named(nodes.ApplyLora, f"{ids}3").execute(
        model, condition, lora, 1.0, scale, attention, 0.0, 1.0
    )[0]
    cache = named(nodes.ConditionCache, f"{ids}4")
    return cache.execute(model, "auto", 2, "fp8", "cpu")[0]


# --- figures -----------------------------------------------------------------------------------


def test_a_run_tells_each_node_its_own(model, lora, editor) -> None:
    with CurrentNodeContext("prompt", "7"):
        sample(graph(model, lora), steps=5)
    (run,) = editor.of("omini2.run")
    assert (run["prompt_id"], run["node"]) == ("prompt", "7")
    assert run["nodes"]["12:3"] == {
        "kind": "condition",
        "attention": "joint",
        "active": True,
        "picture": [6, 6],
        "box": [0, 0, 4, 6],
        "tokens": 24,
        "of": 24,
    }
    cache = run["nodes"]["12:4"]
    assert cache == {
        "kind": "cache",
        "reuse": "auto",
        "computed": 3,
        "reused": 0,
        "steps": 5,
        "kv_bytes": run["kv_bytes"],
        "storage": "fp8",
        "place": "cpu",
        "saved": pytest.approx(0.4),
    }


def test_nodes_outside_of_a_graph_show_nothing(model, lora, editor) -> None:
    sample(apply(model, random_condition(), lora))
    (run,) = editor.of("omini2.run")
    assert run["nodes"] == {} and run["tokens"] == [36]


def test_without_an_editor_nobody_is_told(model, lora, editor) -> None:
    """Other editors would show figures of a graph that they don't have."""
    editor.client_id = None
    sample(graph(model, lora))
    assert editor.sent == []


def test_a_condition_that_is_shut_out_says_so(model, lora, editor) -> None:
    both = graph(graph(model, lora, scale=0.0), lora, ids="")
    sample(both)
    (run,) = editor.of("omini2.run")
    assert not run["nodes"]["12:3"]["active"] and run["nodes"]["3"]["active"]


def test_ids_change_neither_picture_nor_what_is_kept(model, lora) -> None:
    with recorded_runs(keep=True) as runs:
        first = sample(graph(model, lora, "independent"))
        second = sample(graph(model, lora, "independent", ids="5:"))
    assert torch.equal(first, second)
    assert [run.reused for run in runs] == [0, 1]


@pytest.mark.parametrize(
    ("placement", "box"),
    [
        ({"placement": "aligned"}, [0, 0, 4, 6]),
        ({"placement": "fit"}, [0, 0, 8, 9]),
        ({"placement": "left"}, [0, -6, 4, 6]),
        ({"placement": "below"}, [4, 0, 4, 6]),
        ({"placement": "custom", "delta": (2, -3)}, [2, -3, 4, 6]),
        ({"placement": "aligned", "position_scale": 2.0}, [0, 0, 8, 12]),
    ],
)
def test_box_is_where_the_tokens_are(model, lora, placement, box) -> None:
    """Every position lies in the box, and the outermost half a token inside of its border."""
    condition = random_condition(4, 6, **placement)
    (branch,) = get_setup(apply(model, condition, lora)).branches
    figures = branch_figures(branch, (8, 9))
    assert figures["box"] == pytest.approx(box)
    (row, column, height, width), positions = box, condition.positions((8, 9)) + 0.5
    for start, size, count, axis in ((row, height, 4, 0), (column, width, 6, 1)):
        half = size / count / 2
        assert positions[:, axis].min() == pytest.approx(start + half)
        assert positions[:, axis].max() == pytest.approx(start + size - half)


def test_compact_tokens_tells_what_is_left() -> None:
    keep = torch.zeros(6, 6, dtype=torch.bool)
    keep[1, 2] = True
    node = nodes.CompactTokens
    out = node.execute(random_condition(), 1.0, True, "mask", 0.1, 0, False, pixel_mask(keep))
    (figures,) = out.ui["omini2"]
    assert (figures["before"], figures["tokens"], figures["of"]) == (36, 1, 36)
    assert figures["kv_bytes"] == 57 * 2 * 3072 * 2
    assert figures["kept"] == ["000000", "001000", *["000000"] * 4]
    assert json.loads(json.dumps(figures)) == figures


def test_maps_stay_small_and_lose_no_token() -> None:
    keep = torch.zeros(128, 64, dtype=torch.bool)
    keep[127, 0] = True
    lines = kept_map(keep)
    assert (len(lines), len(lines[0])) == (MAP_SIDE, MAP_SIDE // 2)
    assert "".join(lines).count("1") == 1 and lines[-1][0] == "1"
    assert kept_map(torch.ones(3, 40, dtype=torch.bool)) == ["1" * 32] * 2


# --- progress ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "passes"), [("independent", 1), ("joint", 3)], ids=["prefill", "refresh"]
)
def test_computing_kv_moves_a_bar_on_the_cache_node(model, lora, bars, attention, passes) -> None:
    sample(graph(model, lora, attention), steps=5)
    flux = model.model.diffusion_model
    blocks = len(flux.double_blocks) + len(flux.single_blocks)
    one = [("12:4", done, blocks) for done in range(1, blocks + 1)]
    assert bars.moves == one * passes
    assert bars.finished == ["12:4"] * passes


def test_without_a_cache_there_is_no_bar(model, lora, bars) -> None:
    branch = named(nodes.ApplyLora, "3").execute(
        model, random_condition(), lora, 1.0, 1.0, "joint", 0.0, 1.0
    )[0]
    sample(branch)
    assert bars.moves == []


# --- words -------------------------------------------------------------------------------------


def test_warnings_reach_the_editor_as_they_are(model, editor, caplog) -> None:
    message = 'image: <img src=x onerror="alert(1)"> is not used.'
    with caplog.at_level(logging.WARNING), CurrentNodeContext("prompt", "9"):
        errors.warn(message)
    sent = {"message": message, "remedies": [], "prompt_id": "prompt", "node": "9"}
    assert editor.of("omini2.warning") == [sent]
    assert f"Omini2: {message}" in caplog.messages


def test_a_real_warning_gets_there(editor) -> None:
    compact(random_condition(), prune="mask", mask=torch.ones(1, 96, 96))
    (warning,) = editor.of("omini2.warning")
    assert warning["message"].startswith("prune: every token is kept")


@pytest.mark.parametrize("attention", ["independent", "joint"])
def test_one_log_line_a_run(model, lora, attention, caplog) -> None:
    with caplog.at_level(logging.INFO):
        sample(graph(model, lora, attention, condition=random_condition()))
    assert sum(message.startswith("Omini2:") for message in caplog.messages) == 1

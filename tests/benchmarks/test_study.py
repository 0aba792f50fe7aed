"""The study runs from beginning to end, says what is missing, and goes on where it was."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import classifier, costs
from benchmarks.study import __main__ as main
from benchmarks.study import conditions, examples, experiments, report, studio, timing, work
from dev import random_lora
from dev.paths import ROOT


@pytest.fixture
def loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Random LoRAs under the names of the trained ones, which no other test may find."""
    folders, endings = folder_paths.folder_names_and_paths["loras"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([*folders], endings))
    folder = tmp_path / "loras"
    folder.mkdir()
    shapes = random_lora.module_shapes(ROOT / "demo_model" / "transformer.safetensors")
    for seed, name in enumerate((experiments.EDGES, experiments.PRUNED, experiments.JOINT)):
        tensors = random_lora.random_lora(shapes, rank=2, scale=0.1, seed=seed)
        independent = str(name != experiments.JOINT).lower()
        save_file(
            tensors,
            folder / f"{name}.safetensors",
            {"omini2.independent_condition": independent},
        )
    yield folder
    folder_paths.filename_list_cache.pop("loras", None)


@pytest.fixture
def run(loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command with two scenes and two steps in this process."""
    monkeypatch.setattr(studio, "STEPS", 2)
    monkeypatch.setattr(classifier.load, "__defaults__", (64, 1))  # training scenes and epochs
    monkeypatch.setattr(classifier.accuracy, "__defaults__", (8,))

    def run(*options: str) -> tuple[int, str, dict]:
        code = main.main(
            ["--scenes", "2", "--workers", "0", "--quick", "--loras", str(loras),
             "--docs", str(tmp_path / "docs"), "--cache", str(tmp_path / "cache"), *options]
        )  # fmt: skip
        logging.disable(logging.NOTSET)
        page = (tmp_path / "docs/study.md").read_text(encoding="utf-8")
        return code, page, json.loads((tmp_path / "cache/study.json").read_text())

    return run


def store_of(folder: Path):
    """Where `run` keeps what it draws."""
    return work.Places(ROOT / "demo_model", folder / "loras", folder / "cache").store()


def test_a_study_of_two_scenes(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, page, raw = run("--only", "reuse")
    assert code == 0
    rows = raw["experiments"]["reuse"]["rows"]
    independent = [r for r in rows if r["labels"][0] == "independent"]
    assert {r["labels"][1] for r in independent} >= {"every step", "once"}
    # An independent condition is the same at every step, whatever its weights are.
    largest = [r["estimates"]["largest"][0] for r in independent]
    assert len(largest) == 5 and max(largest) < 1e-6
    joint = [r for r in rows if r["labels"] == ["joint", "once"]]
    assert joint[0]["estimates"]["largest"][0] > 1e-3
    assert (tmp_path / "docs/images/study-reuse.png").is_file()
    drawn = set(main._plan([experiments.reuse()])[0])
    examples.sheet(store_of(tmp_path), drawn, 2, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").is_file()

    # What a person has added stays, what is drawn already isn't drawn again.
    words = "What a person concludes."
    (tmp_path / "docs/study.md").write_text(page.replace("## Compression", f"{words}\n\n## Comp"))
    monkeypatch.setattr(studio.Studio, "draw", lambda *_: pytest.fail("drawn again"))
    code, again, _ = run("--only", "reuse")
    assert code == 0 and words in again
    assert "| independent | once |" in again


def test_a_missing_lora_is_named_and_fails(run, capsys: pytest.CaptureFixture) -> None:
    code, page, raw = run("--only", "pruning")
    assert code == 1
    assert f"{experiments.COMPACT}.safetensors missing" in page and "not measured" in page
    assert experiments.COMPACT in capsys.readouterr().out
    kept = {
        tuple(r["labels"]): r["estimates"]["tokens"][0]
        for r in raw["experiments"]["pruning"]["rows"]
        if r["estimates"]
    }
    whole, pruned, grown = (
        kept[("pruned", "1", *rest)]
        for rest in (("off", "-"), ("0 to 0.9", "0"), ("0 to 0.9", "1"))
    )
    assert pruned < grown < whole == 256


def test_cells_that_coincide_are_drawn_once() -> None:
    chosen = experiments.experiments(200)
    cells, references, limits = main._plan(list(chosen))
    assert len(cells) == len(set(cells)) < sum(len(e.rows) for e in chosen)
    assert len({cell.name for cell in cells}) == len(cells)
    assert set(limits.values()) == {40, 100}  # in 32 bits; edits
    assert set(references) <= set(cells) and set(references.values()) <= set(cells)


def test_every_section_has_a_place_and_every_measure_a_head() -> None:
    template = main.TEMPLATE.read_text(encoding="utf-8")
    names = [e.name for e in experiments.experiments(1)] + ["timing", "facts"]
    for name in names:
        assert f"<!-- study:{name} -->" in report.inserted(template, name, "x")
    for experiment in experiments.experiments(1):
        measures = {*experiment.measures, *(m for p in experiment.pairs for m in p.measures)}
        assert measures <= set(report.HEADS)
        assert set(experiment.plots) <= set(experiment.measures)
    with pytest.raises(ValueError, match="markers"):
        report.inserted("nothing", "reuse", "x")


def test_attention_overtakes_where_arithmetic_says() -> None:
    shape = costs.FLUX1_DEV
    # Once: a block's linears are 24 h^2 N and its attention 4 h N (N + C), so with the ends left
    # out attention is more from N + C = 6 h on.
    count = timing.overtakes(shape, 512, 1024, 1024, "once")
    assert count == pytest.approx((6 * shape.hidden - 1536) / 1024, abs=1.5)
    # Every step: conditions don't see each other, so their attention grows no faster than that.
    assert timing.overtakes(shape, 512, 1024, 1024, "every step") is None


def test_the_profile_tells_attention_from_matrix_products() -> None:
    q = torch.randn(1, 2, 512, 32)
    weight = torch.randn(64, 64)

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)

    def multiply() -> None:
        torch.nn.functional.linear(weight, weight, weight[0])

    attention, linear, _ = timing.profiled(attend)
    assert attention > 0 and linear == 0
    attention, linear, _ = timing.profiled(multiply)
    assert linear > 0 and attention == 0


def test_holes_are_whole_tokens_over_a_thing() -> None:
    for index in range(30):
        truth = conditions.truth(index)
        tokens = truth.hole.reshape(16, 16, 16, 16).mean((1, 3))
        assert set(tokens.flatten()) == {0.0, 1.0}
        assert 4 <= tokens.sum() <= 128
    assert (conditions.truth(3).hole == conditions.truth(3).hole).all()


def test_condition_images_are_drawn_from_the_truth() -> None:
    truths = [conditions.truth(i) for i in range(2)]
    for task in conditions.TASKS:
        images = conditions.condition_images(task, truths, side=128)
        side = 128 if task == "subject" else 256
        assert images.shape == (2, side, side, 3)
        assert images.min() >= 0 and images.max() <= 1
    painted = conditions.condition_images("inpainting", truths)
    for image, truth in zip(painted, truths, strict=True):
        assert not image[torch.from_numpy(truth.hole)].any()
    with pytest.raises(ValueError, match="task"):
        conditions.condition_images("smell", truths)

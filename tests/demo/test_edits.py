"""Edits of drawn scenes are judged by pixels, and the demo model's LoRAs make them."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import folder_paths
import numpy as np
import pytest
import torch

from benchmarks.study import edits as study
from benchmarks.study.cells import STEPS
from benchmarks.study.drift import KEPT_FOR
from benchmarks.study.experiments import ALONE, EVERY_STEP, WATCHED
from benchmarks.study.studio import Studio
from dev.demo_model import scenes
from dev.demo_model.edits import KINDS, Edit, random_bringing, random_edit
from dev.demo_model.judge import asked_for, unchanged
from omini2_extension.omini2_core.demo import model as demo_model

SIDE = 128


def edit_of(kind: str, seed: int, test: bool = False) -> Edit:
    random = Random(seed)
    return random_bringing(random, test) if kind == "bring" else random_edit(random, kind, test)


@pytest.mark.parametrize("kind", [*KINDS, "bring"])
def test_the_true_picture_is_what_was_asked_for_and_the_old_one_is_not(kind: str) -> None:
    for seed in range(12):
        edit = edit_of(kind, seed, test=True)
        before, after = (scenes.draw(s, SIDE).picture for s in (edit.before, edit.after))
        assert asked_for(after, edit)
        assert not asked_for(before, edit)
        same = unchanged(edit, SIDE)
        np.testing.assert_array_equal(before[same], after[same])
        assert kind == "background" or same.mean() > 0.5


def test_training_sees_nothing_that_is_held_out() -> None:
    for kind in (*KINDS, "bring"):
        for seed in range(10):
            edit = edit_of(kind, seed)
            for scene in (edit.before, edit.after, edit.other or edit.after):
                assert not any(scenes.held_out(t, scene.background) for t in scene.things)


def test_each_measure_sees_its_own_fault() -> None:
    truth = EVERY_STEP.truth(1)  # a thing is removed
    true = torch.from_numpy(truth.picture)[None]
    moved = true.roll(4, 2)
    darker = true - 0.15 * torch.from_numpy(truth.unchanged)[None, :, :, None]

    def measured(picture: torch.Tensor) -> dict[str, float]:
        return {name: values[0] for name, values in study.measure([truth], picture).items()}

    right = measured(true)
    assert right["edited"] == right["asked"] == 1 and right["moved"] == 0 and right["kept"] > 50
    untouched = measured(torch.from_numpy(truth.before)[None])
    assert untouched["asked"] == untouched["edited"] == 0 and untouched["kept"] > 50
    assert measured(moved)["moved"] == pytest.approx(4, abs=0.5)
    assert measured(moved)["edited"] == 0
    assert measured(darker)["kept"] < study.KEPT and measured(darker)["edited"] == 0


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    """With the shipped LoRAs in front of all others, for this test only."""
    folders, endings = folder_paths.folder_names_and_paths["loras"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([*folders], endings))
    yield Studio(demo_model.FOLDER, demo_model.FOLDER / "loras")
    folder_paths.filename_list_cache.pop("loras", None)


@pytest.mark.parametrize("cell", [EVERY_STEP, ALONE], ids=["joint", "isolated"])
@torch.inference_mode()
def test_a_lora_does_what_its_instruction_says(cell: study.EditCell, studio: Studio) -> None:
    truths = [cell.truth(i) for i in range(8)]

    def measured(words: list[str]) -> dict[str, list[float]]:
        told = [
            replace(t, edit=replace(t.edit, instruction=said))
            for t, said in zip(truths, words, strict=True)
        ]
        return cell.measure(truths, vars(study.draw(studio, cell, told)))

    words = [t.edit.instruction for t in truths]
    right = measured(words)
    assert sum(right["asked"]) >= 5
    assert np.mean(right["kept"]) > study.KEPT
    # Told what the next one should be, which is another kind of edit.
    assert sum(measured(words[1:] + words[:1])["asked"]) <= 1


@torch.inference_mode()
def test_kv_are_watched_without_a_trace_in_the_picture(studio: Studio) -> None:
    truths = [WATCHED.truth(i) for i in range(2)]
    watched, plain = (study.draw(studio, cell, truths) for cell in (WATCHED, EVERY_STEP))
    np.testing.assert_array_equal(watched.latents, plain.latents)
    assert plain.drifts.size == 0
    assert watched.drifts.shape[:3] == (2, len(KEPT_FOR), STEPS)
    # Where reuse would compute K/V there is nothing between them and those of the step.
    for i, steps in enumerate(KEPT_FOR):
        moved = watched.drifts[:, i].any(axis=(0, 2, 3))
        assert moved.tolist() == [step % steps > 0 for step in range(STEPS)]

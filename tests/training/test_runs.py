"""A whole run of the trainer: it learns, goes on where it was, and its file works in the nodes."""

import json
import shutil
from pathlib import Path

import folder_paths
import pytest
import torch
from comfy.latent_formats import Flux as FluxLatents
from safetensors.torch import load_file, safe_open
from tiny import apply, encode, flux_config, make_model, prompt, random_condition, sample

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
from helpers.training import BASE, KnownEncoders, config, latents_of

from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.host.attach import get_setup
from omini2_extension.omini2_core.training.conditions import prepared
from omini2_extension.omini2_core.training.loop import train


def test_it_learns_and_the_file_works_in_the_nodes(tmp_path: Path) -> None:
    settings = config(
        tmp_path,
        steps=100,
        rank=8,
        alpha=4,
        batch_size=4,
        optimizer={"type": "adamw", "lr": 2e-2, "schedule": "cosine"},
        conditions=[{"type": "resize", "name": "copy", "independent_condition": True}],
        max_grad_norm=1.0,
        output=str(tmp_path / "out"),
        samples={"every": 100, "count": 1, "steps": 2},
    )
    seen = []
    result = train(settings, KnownEncoders(), seen.append)
    losses = result.losses
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    trained = [p for p in seen if p.stage == "train"]
    assert [p.step for p in trained] == list(range(1, 101))
    assert trained[-1].picture is not None and trained[-1].picture.is_file()
    records = (tmp_path / "out" / "loss.jsonl").read_text().splitlines()
    assert [json.loads(r)["step"] for r in records] == list(range(1, 101))
    assert list((tmp_path / "out" / "tensorboard").iterdir())

    [path] = result.loras
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["omini2.independent_condition"] == "true"
    assert about["omini2.family"] == "OminiControl"
    assert about["omini2.condition_size"] == "64x64"
    assert about["omini2.position_delta"] == "0,0" and about["omini2.position_scale"] == "1"
    assert about["omini2.steps"] == "100" and about["omini2.images"] == "4"
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    shutil.copy(path, folder / "trained.safetensors")
    folder_paths.filename_list_cache.clear()

    weights = load_file(settings.base)
    off = on = 0.0
    for i in range(2):
        from PIL import Image

        pixels = prepared(Image.open(tmp_path / "pictures" / f"scene{i}.png"), (64, 64))
        latent = latents_of(pixels[None])
        model = make_model(flux_config(True, **BASE), weights)
        steered = apply(model, encode(latent), "trained.safetensors")
        for patched in (model, steered):
            drawn = FluxLatents().process_in(sample(patched, 4, 4, positive=prompt(0)))
            error = float((drawn - latent).square().mean())
            off, on = (off + error, on) if patched is model else (off, on + error)
    assert on < 0.8 * off


def test_a_lora_for_the_picture_too_says_so(tmp_path: Path) -> None:
    conditions = [{"type": "resize", "name": "edit", "main_lora": True}]
    [path] = train(config(tmp_path, steps=2, conditions=conditions), KnownEncoders()).loras
    shutil.copy(path, Path(folder_paths.get_folder_paths("loras")[0]) / "edit.safetensors")
    folder_paths.filename_list_cache.clear()
    model = make_model(flux_config(True, **BASE))
    applied = apply(model, random_condition(4, 4), "edit.safetensors")
    assert get_setup(applied).branches[0].lora.family.name == "IEAP" and applied.patches


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    options = {
        "steps": 6,
        "checkpoint_every": 2,
        "gradient_accumulation": 2,
        "optimizer": {"type": "prodigy"},
        "conditions": [
            {"type": "blur", "variants": 2, "independent_condition": True},
            {"type": "resize", "integration": True},
        ],
    }
    whole = train(config(tmp_path, output=str(tmp_path / "a"), **options), KnownEncoders())
    broken = config(tmp_path, output=str(tmp_path / "b"), **options)
    with pytest.raises(KeyboardInterrupt):
        # Killed in the middle of step 6, after the checkpoint at 4 and a step of its own.
        train(broken, KnownEncoders(), _raise_at(5))
    (tmp_path / "b" / "checkpoints" / ".step-00000006.part").mkdir()  # and while writing one
    resumed = train(broken, KnownEncoders())
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-6)
    for one, other in zip(whole.loras, resumed.loras, strict=True):
        a, b = load_file(one), load_file(other)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    # Something was learnt, or equality would say nothing.
    assert any(v.any() for k, v in load_file(whole.loras[0]).items() if "lora_B" in k)


def _raise_at(step: int):
    def report(progress: object) -> None:
        if progress.stage == "train" and progress.step == step:
            raise KeyboardInterrupt

    return report


def test_a_stop_keeps_what_was_trained(tmp_path: Path) -> None:
    seen = []
    settings = config(tmp_path, steps=50)
    result = train(settings, KnownEncoders(), seen.append, lambda: len(seen) >= 4 + 3)
    assert result.stopped and result.steps == 3 and result.loras[0].is_file()
    assert (settings.output / "checkpoints" / "step-00000003" / "state.json").is_file()
    early = config(tmp_path, output=str(tmp_path / "early"))
    result = train(early, KnownEncoders(), should_stop=lambda: True)
    assert result.stopped and not result.loras and not list(early.output.glob("*.safetensors"))
    shorter = config(tmp_path, steps=5)
    assert train(shorter, KnownEncoders()).steps == 5


def test_another_run_in_the_same_output_is_refused(tmp_path: Path) -> None:
    train(config(tmp_path, steps=1), KnownEncoders())
    with pytest.raises(Omini2Error, match=r"a run with rank 4 instead of 8; set it back.* resume"):
        train(config(tmp_path, steps=2, rank=8), KnownEncoders())
    conditions = [{"type": "resize", "name": "copy"}, {"type": "grey"}]
    with pytest.raises(Omini2Error, match="a run with conditions 1 instead of 2"):
        train(config(tmp_path, steps=2, conditions=conditions), KnownEncoders())
    assert train(config(tmp_path, steps=2, rank=8, resume=False), KnownEncoders()).steps == 2


def test_a_run_goes_on_with_its_own_seed(tmp_path: Path, caplog) -> None:
    """The seed draws the conditions, too: a blur of another seed would be another run's."""
    options = {"conditions": [{"type": "blur", "variants": 2}], "checkpoint_every": 2}
    own, left_alone = (config(tmp_path, output=str(tmp_path / o), **options) for o in "ab")
    whole = train(left_alone, KnownEncoders()).losses
    train(own.model_copy(update={"steps": 2}), KnownEncoders())
    other = train(own.model_copy(update={"seed": 9}), KnownEncoders())
    assert other.losses == pytest.approx(whole, abs=1e-6)
    assert "goes on with its own, 0 instead of 9" in caplog.text
    with safe_open(other.loras[0], "pt") as file:
        assert file.metadata()["omini2.seed"] == "0"


def test_what_only_what_comes_depends_on_may_differ(tmp_path: Path, caplog) -> None:
    train(config(tmp_path, steps=2), KnownEncoders())
    changes = {"optimizer": {"type": "adamw", "lr": 1e-3, "schedule": "cosine"}}
    changes |= {"checkpoint_every": 1, "samples": {"every": 1, "count": 1, "steps": 1}}
    assert train(config(tmp_path, steps=3, **changes), KnownEncoders()).steps == 3
    assert not caplog.text
    assert train(config(tmp_path, steps=1), KnownEncoders()).steps == 3
    assert "steps: this run has 3 already" in caplog.text


# What release 0.1.0 wrote into state.json for this config.
IDENTITY = "4eea62efd26dc754"


def test_a_run_of_the_first_release_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {"base": "base.safetensors", "output": "out", "data": {"folder": "pictures"}}
    assert train(config(Path(), steps=1, **paths), KnownEncoders()).steps == 1
    state = tmp_path / "out" / "checkpoints" / "step-00000001" / "state.json"
    state.write_text(json.dumps({"step": 1, "identity": IDENTITY}))
    with pytest.raises(Omini2Error, match="a run with other settings; set them back"):
        train(config(Path(), rank=8, **paths), KnownEncoders())
    seen = []
    train(config(Path(), steps=2, **paths), KnownEncoders(), seen.append)
    assert [p.step for p in seen if p.stage == "train"] == [2]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    train(config(tmp_path, steps=2, checkpoint_every=1), KnownEncoders())
    newest = tmp_path / "out" / "checkpoints" / "step-00000002" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    seen = []
    train(config(tmp_path, steps=3, checkpoint_every=1), KnownEncoders(), seen.append)
    assert [p.step for p in seen if p.stage == "train"] == [2, 3]


def test_going_on_from_a_lora_file(tmp_path: Path) -> None:
    first = train(config(tmp_path, steps=3, alpha=2), KnownEncoders()).loras[0]
    condition = {"type": "resize", "name": "copy", "init_lora": str(first)}
    changed = config(
        tmp_path,
        output=str(tmp_path / "next"),
        conditions=[condition],
        steps=1,
        optimizer={"type": "adamw", "lr": 1e-12, "weight_decay": 0},
    )
    second = train(changed, KnownEncoders()).loras[0]
    a, b = load_file(first), load_file(second)
    down = next(k for k in a if k.endswith("lora_A.weight"))
    up = down.replace("lora_A", "lora_B")
    torch.testing.assert_close(a[down], b[down])
    # The first was trained at scale 2 / 4, the second at 1.
    torch.testing.assert_close(a[up] * 0.5, b[up])
    with pytest.raises(Omini2Error, match="init_lora"):
        train(changed.model_copy(update={"rank": 8, "output": tmp_path / "x"}), KnownEncoders())


def test_checkpointing_and_bf16_train_the_same_thing(tmp_path: Path) -> None:
    plain = train(config(tmp_path, output=str(tmp_path / "a")), KnownEncoders()).losses
    checkpointed = config(tmp_path, output=str(tmp_path / "b"), gradient_checkpointing=True)
    assert train(checkpointed, KnownEncoders()).losses == pytest.approx(plain, rel=1e-5)
    half = config(tmp_path, output=str(tmp_path / "c"), mixed_precision="bf16")
    assert train(half, KnownEncoders()).losses == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "library", "off"), [("int8", "torchao", 0.01), ("nf4", "bitsandbytes", 0.1)]
)
def test_a_base_in_fewer_bits_trains_the_same_thing(tmp_path, kind, library, off) -> None:
    """Where the library is installed; neither is needed for anything else."""
    pytest.importorskip(library)
    options = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    full = train(config(tmp_path, output=str(tmp_path / "a"), **options), KnownEncoders()).losses
    fewer = config(tmp_path, output=str(tmp_path / "b"), quantize=kind, **options)
    losses = train(fewer, KnownEncoders()).losses
    assert losses != full and losses == pytest.approx(full, rel=off)


def test_the_demo_model_is_a_base(tmp_path: Path) -> None:
    """Through its own text encoder and VAE, in bf16."""
    pictures = config(tmp_path).data.folder
    settings = config(
        tmp_path,
        base="demo",
        steps=1,
        batch_size=1,
        mixed_precision="bf16",
        conditions=[{"type": "canny", "condition_size": 32}],
        data={"folder": str(pictures), "limit": 1},
    )
    result = train(settings)
    with safe_open(result.loras[0], "pt") as file:
        assert file.metadata()["omini2.position_scale"] == "2"
        assert file.metadata()["omini2.base_model"] == "demo"

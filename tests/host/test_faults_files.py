"""Files that change, break or can't be written: one sentence, and nothing is lost."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import folder_paths
import pytest
import torch
from helpers.refusals import refused, sentence
from tiny import apply, prompt, random_condition, random_lora, sample

from dev.paths import ROOT
from omini2_extension import nodes
from omini2_extension.omini2_core.cache import file as cache_file
from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.files import PARTIAL, fingerprint, write_atomically
from omini2_extension.omini2_core.host import saved as host_saved

resource = pytest.importorskip("resource", reason="a disk is made full by the limit of Unix")


def independent(model, lora: str):
    return apply(model, random_condition(3, 4, placement="fit"), lora, attention="independent")


def lora_file(name: str, **options) -> Path:
    return Path(folder_paths.get_folder_paths("loras")[0]) / random_lora(name, **options)


# --- files that are there, and change ----------------------------------------------------------


def write_over(path: Path) -> None:
    """In place, as some downloaders do it."""
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(1000))


def truncate(path: Path) -> None:
    os.truncate(path, 3000)


def delete(path: Path) -> None:
    path.unlink()


def listed(name: str, verdict: str, *values: object):
    return pytest.param(*values, marks=pytest.mark.compatibility("Faults", name, verdict), id=name)


HARMS = [
    ("replaced", write_over),
    ("truncated", truncate),
    ("deleted", delete),
]


@pytest.mark.parametrize(
    "harm", [listed(f"a LoRA file is {name} while it is in use", "works", h) for name, h in HARMS]
)
def test_a_lora_that_is_loaded_does_not_depend_on_its_file(model, harm) -> None:
    path = lora_file("harmed.safetensors")
    conditioned = independent(model, path.name)
    want = sample(conditioned, steps=1)
    harm(path)
    assert torch.equal(sample(conditioned, steps=1), want)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        listed("a LoRA file is truncated between runs", "refused", truncate, "can't be read as a"),
        listed("a LoRA file is deleted between runs", "refused", delete, "there is no harmed"),
    ],
)
def test_a_broken_lora_is_noticed_and_refused(model, harm, said) -> None:
    path = lora_file("harmed.safetensors")
    before = nodes.ApplyLora.fingerprint_inputs(lora_name=path.name, strength=1.0)
    harm(path)
    folder_paths.filename_list_cache.clear()
    # The host asks for this before it takes what it has kept.
    assert nodes.ApplyLora.fingerprint_inputs(lora_name=path.name, strength=1.0) != before
    with refused(f"lora_name: .*{said}") as error:
        independent(model, path.name)
    sentence(error)


def test_another_file_of_the_same_name_is_noticed() -> None:
    path = lora_file("harmed.safetensors")
    before = fingerprint(path)
    os.utime(path, ns=(0, path.stat().st_mtime_ns))
    assert fingerprint(path) == before
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    assert fingerprint(path) != before
    assert fingerprint(None) == fingerprint(path.with_name("missing")) == ""


@pytest.fixture
def keys_values(model) -> cache_file.Saved:
    """A condition's K/V, to be saved."""
    conditioned = independent(model, lora_file("saved_faults.safetensors").name)
    latent = {"samples": torch.zeros(1, 16, 12, 12)}
    return host_saved.compute(conditioned, prompt(0), latent, "")


@pytest.mark.parametrize("harm", [write_over, truncate, delete])
def test_a_cache_that_is_loaded_does_not_depend_on_its_file(
    model, keys_values, tmp_path, harm
) -> None:
    path = tmp_path / "cache.safetensors"
    cache_file.save(keys_values, path)
    loaded = cache_file.load(path, keys_values.fit)
    harm(path)
    got, want = tensors_of(loaded), tensors_of(keys_values)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def tensors_of(kept: cache_file.Saved) -> dict[str, torch.Tensor]:
    blocks = kept.entries[cache_file.IMAGE].blocks
    return {f"{number}.{i}": t for number in blocks for i, t in enumerate(blocks[number].tensors)}


# --- a full disk -------------------------------------------------------------------------------


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process can grow beyond this many bytes: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fills_up(path: Path, write: Callable[[], None]) -> str:
    """Writes a file wherever the disk can be full; the old one stays. Returns what is said."""
    write()
    whole = path.read_bytes()
    path.write_bytes(b"the old one")
    for size in (0, 1, 9, len(whole) // 2, len(whole) - 1):
        with room_for(size), refused(r"can't be written \(.*too large.*\)") as error:
            write()
        sentence(error)
        assert path.read_bytes() == b"the old one"
        assert [p.name for p in path.parent.iterdir()] == [path.name]
    with room_for(len(whole)):
        write()
    assert path.read_bytes() == whole
    return str(error.value)


@pytest.mark.compatibility("Faults", "the disk is full while a cache is saved", "refused")
def test_the_disk_is_full_while_a_cache_is_saved(keys_values, tmp_path) -> None:
    path = tmp_path / "caches" / "cache.safetensors"
    said = fills_up(path, lambda: cache_file.save(keys_values, path))
    assert said.startswith(f"filename_prefix: {path}")


@pytest.mark.compatibility("Faults", "the disk is full while a LoRA is saved", "refused")
def test_the_disk_is_full_while_a_lora_is_saved(tmp_path) -> None:
    pytest.importorskip("peft")
    from omini2_extension.omini2_core.training import lora_file

    path = tmp_path / "out" / "lora.safetensors"
    tensors = {"transformer.x_embedder.lora_A.weight": torch.zeros(4, 64)}
    said = fills_up(path, lambda: lora_file.save_tensors(path, tensors, {"omini2.rank": "4"}))
    assert said.startswith(f"output: {path}")


@pytest.mark.compatibility("Faults", "the disk is full while a checkpoint is saved", "refused")
def test_the_disk_is_full_while_a_checkpoint_is_saved(tmp_path) -> None:
    """The one before stays, and a run goes on from it."""
    pytest.importorskip("accelerate")
    from helpers.training import config

    from omini2_extension.omini2_core.training.checkpoints import last_checkpoint, save_checkpoint

    settings = config(tmp_path)
    loras = [{"a": torch.zeros(1000)}]
    folder = save_checkpoint(settings, 1, loras, {"step": 1}).parent
    largest = max(file.stat().st_size for file in folder.glob("*/*"))
    for size in (0, 100, largest - 1):
        with room_for(size), refused("output: .* can't be written"):
            save_checkpoint(settings, 2, loras, {"step": 2})
        assert [path.name for path in folder.iterdir()] == ["step-00000001"]
        found = last_checkpoint(settings)
        step, [lora], optimizer = found.step, found.loras, found.optimizer
        assert step == 1 and lora["a"].shape == (1000,) and optimizer == {"step": 1}


@pytest.mark.compatibility("Faults", "the disk is full while pictures are encoded", "refused")
def test_a_full_disk_is_no_bad_picture(tmp_path) -> None:
    """Training goes on without pictures that can't be read, but not without those that can."""
    pytest.importorskip("accelerate")
    from helpers.training import KnownEncoders, config

    from omini2_extension.omini2_core.training.loop import train

    settings = config(tmp_path, steps=1)
    with room_for(2000), refused("cache: .* can't be written") as error:
        train(settings, KnownEncoders())
    sentence(error)
    assert train(settings, KnownEncoders()).steps == 1


# TensorBoard writes from a thread of its own, which nobody can hear.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_while_training_says_so(tmp_path) -> None:
    """Not only where a file has to be whole: the log grows by a line a step."""
    pytest.importorskip("accelerate")
    from helpers.training import KnownEncoders, config

    from omini2_extension.omini2_core.training.loop import train

    settings = config(tmp_path, steps=300, checkpoint_every=1000)
    records = settings.output / "loss.jsonl"

    def report(progress: object) -> None:
        if progress.stage == "train" and progress.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (records.stat().st_size, unlimited))

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with room_for(unlimited), refused("output: there is no room left") as error:
        train(settings, KnownEncoders(), report)
    sentence(error)


# --- a process that is killed while it writes --------------------------------------------------

WRITER = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from omini2_core import files

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

path, when = Path(sys.argv[1]), sys.argv[2]
if when != "writing":
    setattr(os, when, killed)
with files.whole_file(path, "output") as partial:
    partial.write_bytes(b"the new")
    if when == "writing":
        killed()
    partial.write_bytes(b"the new one")
"""


@pytest.mark.compatibility("Faults", "killed while a file is written", "works")
@pytest.mark.parametrize("when", ["writing", "fsync", "replace"])
def test_killed_while_writing(tmp_path, when) -> None:
    path = tmp_path / "a [1].safetensors"
    path.write_bytes(b"the old one")
    run = subprocess.run([sys.executable, "-c", WRITER, path, when], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert path.read_bytes() == b"the old one"
    assert len(list(tmp_path.iterdir())) == 2
    write_atomically(path, b"the next one", "output")
    assert path.read_bytes() == b"the next one"
    assert list(tmp_path.iterdir()) == [path]


def test_only_its_own_leftovers_are_removed(tmp_path) -> None:
    other = tmp_path / f".another.safetensors.1234abcd{PARTIAL}"
    other.write_bytes(b"somebody's")
    write_atomically(tmp_path / "one.safetensors", b"x", "output")
    assert other.exists()


def test_where_nothing_may_be_written(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"in the place of a folder")
    with pytest.raises(Omini2Error, match=r"output: .*can't be written"):
        write_atomically(tmp_path / "file" / "x.safetensors", b"x", "output")

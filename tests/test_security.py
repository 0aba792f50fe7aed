"""What SECURITY.md promises: files only from the host's folders, no code in them, no way out."""

import ast
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import folder_paths
import pytest
import torch
from aiohttp.test_utils import make_mocked_request
from helpers.refusals import refused, sentence
from helpers.saved import independent, read, write
from helpers.train_node import VALUES
from safetensors.torch import load_file, safe_open, save_file
from tiny import apply, random_condition, random_lora, sample

import omini2_extension.nodes as nodes
from dev.paths import ROOT
from dev.quality.fuzz.__main__ import resident
from omini2_extension.nodes.demo_image import DemoImage
from omini2_extension.nodes.demo_model import DemoModel
from omini2_extension.omini2_core.cache import file as cache_file
from omini2_extension.omini2_core.host import routes
from omini2_extension.omini2_core.host.folders import read_header
from omini2_extension.omini2_core.lora import file as lora_file
from omini2_extension.omini2_core.lora.file import load_lora
from omini2_extension.omini2_core.training import inputs

OUTSIDE = ["../outside.safetensors", "/etc/passwd", "..\\outside.safetensors", "C:\\x.safetensors",
           "outside.safetensors\0", "sub/../../outside.safetensors", "", ".",
           "x" * 5000]  # fmt: skip


# --- files are only read inside the host's folders -----------------------------------------------


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_a_folder(model, cache_folder, host_folders, name) -> None:
    """Not a LoRA's, a cache's, a photo's, a base model's or a folder of pictures'."""
    for outside in (host_folders, cache_folder):
        save_file({"x": torch.zeros(1)}, outside.parent / "outside.safetensors")
    wrong = {
        "lora_name": lambda: apply(model, random_condition(), name),
        "cache_name": lambda: read(model, name),
        "photo": lambda: DemoImage.execute(name),
        "base": lambda: inputs.config_for({**VALUES, "base": name}),
        "images": lambda: inputs.config_for({**VALUES, "images": name}),
        "condition_folder": lambda: inputs.config_for(
            {**VALUES, "condition": "folder", "condition_folder": name}
        ),
    }
    for key, use in wrong.items():
        with refused(f"^{key}: there is no ") as error:
            use()
        sentence(error)
    request = make_mocked_request("GET", f"/omini2/preset?{urlencode({'lora': name})}")
    answer = asyncio.run(routes.preset(request))
    assert answer.status == 404 and set(json.loads(answer.text)) == {"error"}
    nodes.LoadCache.fingerprint_inputs(cache_name=name)


@pytest.mark.parametrize(
    "name", [*OUTSIDE[:7], "/absolute", "a/../../b", "a//b", "..", "a:b", "a\nb", "x" * 101, 3]
)
def test_nothing_is_written_outside_of_a_folder(model, cache_folder, host_folders, name) -> None:
    conditioned = independent(model, random_lora("outside.safetensors"))
    before = sorted(cache_folder.parent.rglob("*"))
    with refused("^filename_prefix: .* is no file name") as error:
        nodes.SaveCache.execute(conditioned, [[torch.zeros(1, 5, 24), {}]], {}, name)
    sentence(error)
    assert sorted(cache_folder.parent.rglob("*")) == before
    if name in ("C:\\x.safetensors", "a:b", "..", "x" * 101, OUTSIDE[4]):
        with refused("^lora_name: .* is no file name"):
            inputs.config_for({**VALUES, "lora_name": name})


@pytest.mark.parametrize("name", ["kept", "two words", "sub/kept", "Ünïcode", "a.b-c_(1)", "v%1"])
def test_ordinary_names_are_taken(model, cache_folder, name) -> None:
    conditioned = independent(model, random_lora("inside.safetensors"))
    prompt = [[torch.zeros(1, 5, 24), {"pooled_output": torch.zeros(1, 16), "guidance": 3.5}]]
    nodes.SaveCache.execute(conditioned, prompt, {"samples": torch.zeros(1, 16, 12, 12)}, name)
    (path,) = cache_folder.rglob("*.safetensors")
    assert path.relative_to(cache_folder).as_posix() == f"{name}_00001_.safetensors"


def test_a_link_that_the_user_has_made_counts_as_inside(model, tmp_path) -> None:
    """People keep their models on another disk and link to them: the host lists those."""
    loras = Path(folder_paths.get_folder_paths("loras")[0])
    inside = Path(folder_paths.get_full_path("loras", random_lora("linked.safetensors")))
    inside.rename(tmp_path / "elsewhere.safetensors")
    inside.symlink_to(tmp_path / "elsewhere.safetensors")
    folder_paths.filename_list_cache.clear()
    apply(model, random_condition(), "linked.safetensors")
    (loras / "linked.safetensors").unlink()
    folder_paths.filename_list_cache.clear()


# --- no code in files, no way out ----------------------------------------------------------------

FORBIDDEN_MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess",
    "socket", "ssl", "requests", "urllib", "urllib3", "http", "httpx", "ftplib", "smtplib",
    "telnetlib", "websockets", "ctypes", "pty", "code", "codeop", "runpy", "pip", "webbrowser",
    "importlib", "huggingface_hub",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execve",
    "os.spawnl", "os.spawnv", "os.posix_spawn", "os.fork", "torch.load", "torch.hub.load",
    "numpy.load", "np.load", "yaml.load", "comfy.utils.load_torch_file",
}  # fmt: skip
ALLOWED = {
    # The trainer's own optimiser state, in its own output folder; see SECURITY.md.
    ("omini2_core/training/checkpoints.py", "torch.load"): "weights_only=True",
    # The demo model's own files.
    ("omini2_core/demo/model.py", "comfy.utils.load_torch_file"): "safe_load=True",
}
SOURCES = [ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py"),
           *(ROOT / "omini2_core").rglob("*.py")]  # fmt: skip


def forbidden_in(source: str, file: str) -> list[str]:
    """What a module must not have: imports, and calls by their whole name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}"]
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            condition = ALLOWED.get((file, call), "never")
            if call in FORBIDDEN_CALLS and condition not in ast.unparse(node):
                found.append(call)
            continue
        else:
            continue
        found += [name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_pickle_no_network_no_process_in_the_source(path) -> None:
    file = path.relative_to(ROOT).as_posix()
    assert forbidden_in(path.read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from urllib.request import urlopen", "import os.path, subprocess as s",
     "torch.load(x)", "eval('1')", "def f():\n    os.system('x')", "from http import client"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(line) -> None:
    assert len(forbidden_in(line, "nodes/x.py")) == 1


EVENTS = {
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "pty.spawn", "urllib.Request", "http.client.connect", "pickle.find_class", "webbrowser.open",
}  # fmt: skip
_heard: list[list[str]] = []


def _hear(event: str, arguments: tuple) -> None:
    if _heard and event in EVENTS:
        _heard[-1].append(f"{event} {arguments!r:.100}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """What Python says about processes, connections and pickles meanwhile."""
    if not hasattr(_hear, "added"):
        sys.addaudithook(_hear)  # which can't be taken back
        _hear.added = True
    _heard.append([])
    try:
        yield _heard[-1]
    finally:
        _heard.pop()


def test_a_graph_starts_no_process_and_no_connection(model, cache_folder) -> None:
    """Every node but the trainer, and a run of what they build."""
    import dev.quality.fuzz.workflows as workflows

    loras = list(folder_paths.get_folder_paths("loras"))
    DemoModel.execute()  # what the host itself imports for it is not ours
    with watched() as heard:
        workflows.read(workflows.PROMPT)  # through the host's own validation and execution
        DemoModel.execute()
        DemoImage.execute("coffee")
        conditioned = independent(model, random_lora("watched.safetensors"))
        name = write(conditioned, cache_folder)
        sample(nodes.ImageGuidance.execute(read(model, name), 1.0)[0], steps=1)
    assert heard == []
    folder_paths.folder_names_and_paths["loras"][0][:] = loras


def test_the_watch_hears_a_process_and_a_connection() -> None:
    import socket

    with watched() as heard:
        subprocess.run([sys.executable, "-c", ""], check=True)
        with socket.socket() as tried:
            tried.connect_ex(("127.0.0.1", 9))
    assert {line.partition(" ")[0] for line in heard} >= {"subprocess.Popen", "socket.connect"}


# --- files that lie ------------------------------------------------------------------------------


@pytest.mark.compatibility("Faults", "a cache file with a changed bit", "refused")
@pytest.mark.parametrize("where", ["k", "v", "pooled", "description", "guidance", "lora"])
def test_any_changed_part_of_a_cache_is_noticed(model, cache_folder, where) -> None:
    name = write(
        independent(model, random_lora("hashed.safetensors")), cache_folder, description="a hat"
    )
    path = cache_folder / name
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[cache_file.HEADER])
    tensors = load_file(path)
    if where in header:
        header[where] = {"description": "a cat", "guidance": 2.0, "lora": "other"}[where]
    else:
        data = tensors[where if where == "pooled" else f"image.2.{where}"].view(torch.uint8)
        data.flatten()[7] ^= 1
    save_file(tensors, path, {cache_file.HEADER: json.dumps(header)})
    with refused(f"^cache_name: {name} can't be used .its content isn't what its hash says"):
        read(model, name)


@pytest.mark.compatibility("Faults", "a file whose header claims a terabyte", "refused")
def test_a_terabyte_is_refused_without_being_read(model, cache_folder, tmp_path) -> None:
    """Whether a header only claims it, or a file really is as long (and holds nothing)."""
    key = "transformer.x_embedder.lora_A.weight"
    length = 1 << 40
    entry = {"dtype": "F32", "shape": [length // 256, 64], "data_offsets": [0, length]}
    header = json.dumps({key: entry, "__metadata__": {cache_file.HEADER: "{}"}}).encode()
    paths = [tmp_path / "claims.safetensors", tmp_path / "sparse.safetensors"]
    for path in paths:
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"end")
    os.truncate(paths[1], 8 + len(header) + length)
    loaded = resident()
    for path in paths:
        with refused("^lora_name: "):
            load_lora(path, {}, set())
        with refused("^cache_name: "):
            cache_file.load(path, cache_file.Fit("", 1, 1, 1, "torch.float32"))
        read_header(path)  # gives an answer, whatever it is
    assert resident() - loaded < 16  # MiB


def test_no_tensor_is_read_before_all_shapes_are_right(model, monkeypatch) -> None:
    name = random_lora("wrong_shape.safetensors")
    path = folder_paths.get_full_path("loras", name)
    tensors = load_file(path)
    last = sorted(tensors)[-1]
    save_file({**tensors, last: tensors[last][:, :1].contiguous()}, path)

    monkeypatch.setattr(lora_file, "_delta", lambda *a: pytest.fail("read before it was checked"))
    with refused("^lora_name: .* was made for a model of another size"):
        apply(model, random_condition(), name)

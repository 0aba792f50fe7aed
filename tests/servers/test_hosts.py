"""Other ComfyUIs: what they lack is found out when they start, and costs nobody their start."""

import inspect
import json
import logging
import urllib.request
from collections.abc import Iterator
from typing import Any

import comfy.ldm.flux.math
import comfy.ldm.flux.model
import comfy.model_management
import comfy.patcher_extension
import comfy_api.latest
import pytest
import torch
from in_editor import Editor, open_browser

from dev.host.server import EXTENSION, Server
from dev.paths import ROOT
from omini2_extension.omini2_core.host import versions

pytestmark = pytest.mark.xdist_group("older_host")


def row(name: str, verdict: str = "works") -> pytest.MarkDecorator:
    return pytest.mark.compatibility("Hosts", name, verdict, "")


@row("All that the nodes work through is there")
def test_this_host_has_everything(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert versions.hooks_called() == set(versions.HOOKS)
        assert not versions.refused()
    assert "Omini2" not in caplog.text, "the hooks were not tried"


# --- what is taken away from the host ----------------------------------------------------------

Flux = comfy.ldm.flux.model.Flux


def no_attention_override(patch: pytest.MonkeyPatch) -> None:
    attention = comfy.ldm.flux.math.optimized_attention

    def older(*args: Any, transformer_options: Any = None, **kwargs: Any) -> torch.Tensor:
        return attention(*args, **kwargs)

    patch.setattr(comfy.ldm.flux.math, "optimized_attention", older)


def no_forward_wrapper(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Flux, "forward", lambda self, *args, **kwargs: self._forward(*args, **kwargs))


def no_option(name: str) -> Any:
    def take(patch: pytest.MonkeyPatch) -> None:
        forward = Flux.forward_orig
        signature = inspect.signature(forward)

        def older(*args: Any, **kwargs: Any) -> torch.Tensor:
            given = signature.bind(*args, **kwargs)
            options = dict(given.arguments["transformer_options"])
            del options[name]
            given.arguments["transformer_options"] = options
            return forward(*given.args, **given.kwargs)

        patch.setattr(Flux, "forward_orig", older)

    return take


def no_part(module: Any, name: str) -> Any:
    return lambda patch: patch.delattr(module, name)


@row("A hook is missing", "refused")
@pytest.mark.parametrize(
    ("take", "lacking"),
    [
        (no_attention_override, "attention override hook"),
        (no_forward_wrapper, "DIFFUSION_MODEL hook"),
        (no_option("patches"), "post_input hook"),
        (no_option("patches_replace"), "double_block hook"),
        (
            no_part(comfy.patcher_extension.WrappersMP, "PREPARE_SAMPLING"),
            "comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING",
        ),
        (no_part(comfy_api.latest, "ComfyExtension"), "comfy_api.latest.ComfyExtension"),
    ],
)
def test_what_is_missing_is_named(
    take: Any, lacking: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    take(monkeypatch)
    assert versions.refused()
    assert caplog.messages == [
        f"Omini2: This ComfyUI has no {lacking}, which the nodes work through, so they are left "
        f"out; update ComfyUI to {versions.NEEDED} or newer, or take out the extension that "
        "removes it."
    ]


def test_a_model_that_cannot_be_tried_speaks_against_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A newer host may build its FLUX in another way."""

    def build(*args: Any, **kwargs: Any) -> None:
        raise TypeError("a field is missing")

    monkeypatch.setattr(Flux, "__init__", build)
    assert not versions.refused()


def test_trying_the_hooks_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    versions.hooks_called()
    assert torch.equal(torch.get_rng_state(), before)


# --- a real start without one ------------------------------------------------------------------

OLDER = """
from comfy.patcher_extension import CallbacksMP

del CallbacksMP.ON_DETACH
"""
OTHER = """
class Other:
    RETURN_TYPES, FUNCTION, CATEGORY = (), "run", "test"
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    run = lambda self: ()

NODE_CLASS_MAPPINGS = {"OtherNode": Other}
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The host's server with another extension, which takes one of the host's hooks away."""
    base = tmp_path_factory.mktemp("older")
    other = base / "custom_nodes" / "Other"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text(OTHER)
    (other / "prestartup_script.py").write_text(OLDER)  # the host runs these first of all
    with Server(base, base / "server.log") as running:
        yield running


def get(server: Server, path: str) -> str:
    with urllib.request.urlopen(f"{server.address}{path}", timeout=30) as answer:
        return answer.read().decode()


@row("ComfyUI starts where a hook is missing")
def test_the_host_starts_without_our_nodes(older: Server) -> None:
    log = older.log.read_text(errors="replace")
    [line] = [line for line in log.splitlines() if "Omini2" in line and "left out" in line]
    assert "has no comfy.patcher_extension.CallbacksMP.ON_DETACH" in line
    assert "Traceback" not in log and "IMPORT FAILED" not in log
    nodes = get(older, "/object_info")
    assert '"KSampler"' in nodes and '"OtherNode"' in nodes
    assert '"Omini2' not in nodes


def test_the_editor_says_why_the_nodes_are_missing(older: Server) -> None:
    served = f"/extensions/{EXTENSION}/refused.js"
    assert [url for url in json.loads(get(older, "/extensions")) if EXTENSION in url] == [served]
    with open_browser() as browser:
        editor = Editor(
            browser, older, "classic", ROOT / "test_output" / "editor", known="OtherNode"
        )
        toast = editor.page.locator(".p-toast-detail", has_text="that the Omini2 nodes need")
        toast.wait_for()
        assert f"Update ComfyUI to {versions.NEEDED} or newer." in toast.inner_text()
        editor.screenshot("refused")
        assert not editor.errors


# --- what differs ------------------------------------------------------------------------------


def test_the_version_is_the_one_that_the_registry_knows() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-comfyui = ">={versions.NEEDED}"' in text


def test_out_of_memory() -> None:
    assert versions.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not versions.is_out_of_memory(ValueError("out of memory"))
    # What some drivers raise instead, as hosts that know of it see it.
    error = torch.AcceleratorError("CUDA error: out of memory")
    knows = hasattr(comfy.model_management, "is_oom")
    assert versions.is_out_of_memory(error) == knows

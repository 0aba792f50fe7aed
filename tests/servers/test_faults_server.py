"""A real server whose files change, whose users are impatient, and which is killed."""

import asyncio
import copy
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import soak
from dev.host.prompts import Prompt, to_prompt
from dev.host.server import Client, Interrupted, RunError, Server, ServerError
from dev.paths import ROOT
from dev.random_lora import make_lora
from dev.workflows import demo

pytestmark = pytest.mark.xdist_group("faults_server")

WORKFLOW = ROOT / "example_workflows" / "try-it-without-a-checkpoint.json"
NAMES = "one.safetensors", "other.safetensors"


class Host:
    """A server on a folder, which can be started again."""

    def __init__(self, folder: Path) -> None:
        self.base, self.log = folder / "base", folder / "server.log"
        self.loras = self.base / "models" / "loras"
        demo.prepare_input(self.base)
        self.loras.mkdir(parents=True)
        self.restore()
        self.start()
        self.prompt = self._prompt()

    def start(self) -> None:
        self.server = Server(self.base, self.log)
        self.server.__enter__()

    def restore(self) -> None:
        """Both LoRAs as they were at first."""
        for seed, name in enumerate(NAMES):
            make_lora(self.loras / name, seed=seed)

    def _prompt(self) -> Prompt:
        async def ask() -> Prompt:
            async with Client(self.server) as client:
                graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
                return to_prompt(graph, await client.object_info())

        return asyncio.run(ask())

    def wanted(self, lora: str = NAMES[0], seed: int = 1, steps: int = 2) -> Prompt:
        """A small picture with a LoRA."""
        prompt = copy.deepcopy(self.prompt)
        changes: dict[str, dict[str, Any]] = {
            "Omini2ApplyLoRA": {"lora_name": lora},
            "KSampler": {"seed": seed, "steps": steps},
            "EmptySD3LatentImage": {"width": 128, "height": 128},
        }
        for node in prompt.values():
            node["inputs"].update(changes.get(node["class_type"], {}))
        return prompt

    def draw(self, *prompts: Prompt) -> list[bytes]:
        """The pictures of prompts that are queued at once, each by an editor of its own."""

        async def one(prompt: Prompt) -> bytes:
            async with Client(self.server) as client:
                outcome = await client.run(prompt, lambda: None)
                picture = await demo.picture_of(client, prompt, outcome)
                return picture.tobytes()

        async def every() -> list[bytes]:
            return await asyncio.gather(*map(one, prompts))

        return asyncio.run(every())


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    # A shell that starts us in the background has Ctrl-C's signal ignored, and so would the server.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = Host(tmp_path_factory.mktemp("faults"))
    yield running
    running.server.stop()
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def pictures(host: Host) -> dict[tuple[str, int], bytes]:
    """What each LoRA and seed gives when nothing goes wrong."""
    keys = [(NAMES[0], 1), (NAMES[1], 1), (NAMES[0], 2)]
    made = {key: host.draw(host.wanted(*key))[0] for key in keys}
    assert len(set(made.values())) == len(keys)
    return made


@pytest.mark.compatibility("Faults", "two prompts are queued at once", "works")
def test_two_prompts_at_once(host: Host, pictures) -> None:
    keys = [(NAMES[1], 1), (NAMES[0], 2)]
    assert host.draw(*(host.wanted(*key) for key in keys)) == [pictures[key] for key in keys]


@pytest.mark.compatibility("Faults", "a LoRA file is replaced between runs", "works")
def test_the_lora_is_replaced(host: Host, pictures) -> None:
    """The graph is the same, so only the file says that there is anything to do."""
    one, other = (host.loras / name for name in NAMES)
    want = host.wanted()
    shutil.copy(other, one)  # in place
    assert host.draw(want) == [pictures[NAMES[1], 1]]
    make_lora(one.with_suffix(".new"), seed=0)
    os.replace(one.with_suffix(".new"), one)  # as a whole
    assert host.draw(want) == [pictures[NAMES[0], 1]]


def test_the_lora_is_truncated_and_deleted(host: Host, pictures) -> None:
    path, want = host.loras / NAMES[0], host.wanted()
    assert host.draw(want) == [pictures[NAMES[0], 1]]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(RunError, match=r"lora_name: one\.safetensors can.t be read as a"):
        host.draw(want)
    path.unlink()
    # Newer hosts refuse it themselves.
    said = r"lora_name(: | - )(there is no one\.safetensors|'one\.safetensors' not in)"
    with pytest.raises(RunError, match=said):
        host.draw(want)
    host.restore()
    assert host.draw(want) == [pictures[NAMES[0], 1]]


@pytest.mark.compatibility("Faults", "Cancel in a real server", "works")
def test_cancel(host: Host, pictures) -> None:
    async def cancelled() -> None:
        async with Client(host.server) as client:
            pressed = []

            def press() -> None:
                if not pressed:
                    pressed.append(asyncio.ensure_future(client.interrupt()))

            with pytest.raises(Interrupted):
                await client.run(host.wanted(seed=2, steps=200), press)
            await asyncio.gather(*pressed)

    asyncio.run(cancelled())
    for key, picture in pictures.items():
        assert host.draw(host.wanted(*key)) == [picture]


def test_what_came_before_does_not_matter(host: Host) -> None:
    """Graphs of the soak, one of each kind, one after the other and in the opposite order."""

    async def both() -> tuple[list[str | None], list[str | None]]:
        async with Client(host.server) as client:
            graphs = soak.draw_graphs(len(soak.KINDS), 0, await client.object_info())
            there = [await soak.picture(client, graph, 0) for graph in graphs]
            return there, [await soak.picture(client, graph, 0) for graph in reversed(graphs)]

    there, back = asyncio.run(both())
    assert None not in there and len(set(there)) == len(soak.KINDS)
    assert back == there[::-1]


STOPS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGKILL] if os.name != "nt" else [])]


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(
            number,
            marks=pytest.mark.compatibility(
                "Faults", f"the server gets {number.name} during a run", "works"
            ),
        )
        for number in STOPS
    ],
)
def test_the_server_is_stopped_during_a_run(host: Host, pictures, number) -> None:
    """Started again, it gives the same picture."""

    async def stopped() -> None:
        async with Client(host.server) as client:
            await client.run(
                host.wanted(seed=2, steps=500), lambda: os.kill(host.server.pid, number)
            )

    with pytest.raises(ServerError):
        asyncio.run(stopped())
    host.server.stop()
    host.start()
    assert host.draw(host.wanted()) == [pictures[NAMES[0], 1]]

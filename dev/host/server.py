"""A ComfyUI server of our own for a while, and running prompts on it as the editor does."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from dev.host.prompts import ObjectInfo, Prompt
from dev.paths import ROOT, host_path

START_LIMIT, STOP_LIMIT, RUN_LIMIT = 240, 15, 3600  # seconds
LOG_LINES = 15
EXTENSION = "ComfyUI-Omini2"
NOT_COPIED = (".*", "__pycache__", "demo_output", "test_output", "tests", "benchmarks")


class ServerError(RuntimeError):
    """The server did not start, or went away."""


class RunError(RuntimeError):
    """A prompt failed; the server's own words."""


class Interrupted(RunError):
    """A prompt was cancelled."""


def prepare_base(base: Path, extension: Path = ROOT) -> None:
    """A base directory for the host with this extension among its custom nodes."""
    for name in ("input", "models", "custom_nodes", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / EXTENSION
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)
    try:
        link.symlink_to(extension, target_is_directory=True)
    except OSError:  # Windows without the right to make links
        shutil.copytree(extension, link, ignore=shutil.ignore_patterns(*NOT_COPIED))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """The host's real server on a free loopback port, for the length of a `with` block."""

    def __init__(
        self,
        base: Path,
        log: Path,
        gpu: bool = False,
        extension: Path = ROOT,
        previews: bool = False,
    ) -> None:
        """
        Args:
            previews: whether samplers show the picture as it comes to be.
        """
        self.base, self.log, self.gpu, self.extension = base, log, gpu, extension
        self.previews = previews
        self.address = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        prepare_base(self.base, self.extension)
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.base,
                # Threads that wait by spinning stop each other on a machine with other work:
                # that made a step take up to 20 times as long.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for us: we stop the server, also when nobody pressed anything.
                start_new_session=os.name != "nt",
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _command(self) -> list[str | Path]:
        command = [
            *(sys.executable, host_path() / "main.py", "--base-directory", self.base),
            *("--port", self.address.rpartition(":")[2], "--disable-auto-launch"),
            *("--disable-api-nodes", "--database-url", "sqlite:///:memory:"),
            *(("--preview-method", "latent2rgb") if self.previews else ()),
        ]
        # On a CPU the host's own choice of attention takes about twice as long.
        return command if self.gpu else [*command, "--cpu", "--use-pytorch-cross-attention"]

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            self.check()
            try:
                with urllib.request.urlopen(f"{self.address}/system_stats", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise ServerError(f"the server did not answer within {START_LIMIT} s.{self._log_end()}")

    def check(self) -> None:
        """
        Raises:
            ServerError: the server has ended.
        """
        code = self._process.poll() if self._process else None
        if code is not None:
            raise ServerError(f"the server ended with exit code {code}.{self._log_end()}")

    def _log_end(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join([f" Its log is {self.log} and ends with:", *lines])

    @property
    def pid(self) -> int:
        """The id of the server's process.

        Raises:
            ServerError: it isn't running.
        """
        if self._process is None:
            raise ServerError("the server has not been started.")
        return self._process.pid

    def stop(self) -> None:
        """Ends the server, by force if it doesn't listen."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Outcome:
    """What running a prompt gave.

    Attributes:
        images: node id -> the images that it showed or saved, as /view wants them named.
        seconds: node id -> how long it took.
        samplers: the nodes that reported steps.
        omini2: the figures of every Omini2 run.
    """

    images: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    samplers: set[str] = field(default_factory=set)
    omini2: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sampling_seconds(self) -> float:
        """Seconds in the sampler nodes."""
        return sum(self.seconds.get(node, 0.0) for node in self.samplers)


class Client:
    """The editor's side: queues prompts and follows them on the websocket."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._id = uuid.uuid4().hex

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(self._server.address)
        try:
            self._socket = await self._session.ws_connect(
                f"/ws?clientId={self._id}", max_msg_size=0
            )
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._socket.close()
        await self._session.close()

    async def object_info(self) -> ObjectInfo:
        """What the server says about its nodes."""
        async with self._session.get("/object_info") as answer:
            return await answer.json()

    async def image(self, image: dict[str, str]) -> bytes:
        """The file of an image in an outcome."""
        async with self._session.get("/view", params=image) as answer:
            answer.raise_for_status()
            return await answer.read()

    async def interrupt(self) -> None:
        """Ends the prompt that runs, as the editor's Cancel does."""
        async with self._session.post("/interrupt") as answer:
            answer.raise_for_status()

    async def clear_history(self) -> None:
        """Has the server forget what was queued: it keeps thousands of prompts."""
        async with self._session.post("/history", json={"clear": True}) as answer:
            answer.raise_for_status()

    async def run(self, prompt: Prompt, step: Callable[[], None]) -> Outcome:
        """Queues a prompt and waits for its end; calls `step` at every sampling step.

        Raises:
            Interrupted: somebody pressed Cancel.
            RunError: the server refused it, it failed, or it took longer than RUN_LIMIT.
        """
        body = {"prompt": prompt, "client_id": self._id}
        async with self._session.post("/prompt", json=body) as answer:
            content = await answer.json()
        # A prompt with one good output is taken, and the rest of it left out.
        if "error" in content or content.get("node_errors"):
            raise RunError(refusal(content))
        try:
            return await asyncio.wait_for(self._follow(content["prompt_id"], step), RUN_LIMIT)
        except asyncio.TimeoutError:
            raise RunError(f"it took longer than {RUN_LIMIT} s") from None

    async def _follow(self, prompt_id: str, step: Callable[[], None]) -> Outcome:
        outcome = Outcome()
        node, since = None, time.perf_counter()
        async for message in self._socket:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue  # previews
            event = json.loads(message.data)
            kind, data = event["type"], event.get("data") or {}
            if data.get("prompt_id", prompt_id) != prompt_id:
                continue
            now = time.perf_counter()
            if kind in ("executing", "execution_success") and node is not None:
                outcome.seconds[node] = outcome.seconds.get(node, 0.0) + now - since
            if kind == "executing":
                node, since = data["node"], now
            elif kind == "progress":
                outcome.samplers.add(data["node"])
                step()
            elif kind == "executed":
                outcome.images[data["node"]] = (data.get("output") or {}).get("images", [])
            elif kind == "omini2.run":
                outcome.omini2.append(data)
            elif kind == "execution_error":
                raise RunError(f"{data['node_type']}: {data['exception_message'].strip()}")
            elif kind == "execution_interrupted":
                raise Interrupted("it was interrupted")
            elif kind == "execution_success":
                return outcome
        self._server.check()
        raise ServerError("the server closed the connection.")


def refusal(answer: dict[str, Any]) -> str:
    """Why the server did not take a prompt."""
    reasons = [
        f"{node['class_type']} (node {node_id}): {error['message']}: {error['details']}"
        for node_id, node in (answer.get("node_errors") or {}).items()
        for error in node["errors"]
    ]
    if reasons:
        return "; ".join(reasons)
    error = answer["error"]
    return f"{error['message']} {error.get('details', '')}".strip()

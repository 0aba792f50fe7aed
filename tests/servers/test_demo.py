"""The main job from end to end: the real server, a real workflow, real pictures."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from PIL import Image

from dev.host.prompts import to_prompt
from dev.paths import ROOT
from dev.workflows import demo

NAME = "try-it-without-a-checkpoint"
LIMIT = 120  # seconds; a few are enough


def answers(address: str) -> bool:
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


async def shows_previews(address: str) -> bool:
    """Whether a person sees the picture as it comes to be."""
    text = (ROOT / "example_workflows" / f"{NAME}.json").read_text(encoding="utf-8")
    async with (
        aiohttp.ClientSession(address) as session,
        session.ws_connect("/ws?clientId=someone", max_msg_size=0) as socket,
    ):
        async with session.get("/object_info") as answer:
            prompt = to_prompt(json.loads(text), await answer.json())
        for node in prompt.values():
            if node["class_type"] == "KSampler":
                node["inputs"]["seed"] = 99  # not kept from the run before
        await session.post("/prompt", json={"prompt": prompt, "client_id": "someone"})
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                return True
            if json.loads(message.data)["type"] == "execution_success":
                break
    return False


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_demo_runs_serves_and_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dev.workflows.demo", "--only", NAME, "--output", tmp_path]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "SERVE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "until you press Ctrl-C" in line:
                break
        printed = "".join(lines)
        address = re.search(r"ComfyUI stays at (\S+)", printed)[1]
        assert answers(address)
        assert asyncio.run(shows_previews(address))
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 0
        assert not answers(address)
    finally:
        process.kill()

    header, row = (line for line in lines if line.startswith(("workflow ", f"{NAME}  ")))
    assert all(column in header for column in demo.COLUMNS)
    cells = re.split(r"\s{2,}", row.strip())
    assert cells[:3] == [NAME, "demo model", "12"]
    seconds, per_step, per_step_without, tokens, megabytes, refreshes = map(float, cells[3:])
    assert min(seconds, per_step, per_step_without, megabytes) > 0
    assert abs(per_step - seconds / 12) < 0.01
    assert tokens == 256 and refreshes == 1  # its LoRA is independent

    pictures = {p.name: Image.open(p) for p in tmp_path.glob("*.png")}
    kinds = ["", ".without", ".condition-1"]
    assert set(pictures) == {f"{NAME}{kind}.png" for kind in kinds} | {"contact_sheet.png"}
    with_condition, without = (pictures[f"{NAME}{kind}.png"] for kind in kinds[:2])
    assert with_condition.size == without.size == (256, 256)
    assert with_condition.tobytes() != without.tobytes()


def test_unknown_workflow_is_said_at_once() -> None:
    with pytest.raises(SystemExit, match="no workflow nonsense; there are"):
        demo.chosen(["nonsense"])


@pytest.mark.parametrize(("seconds", "cell", "caption"), [
    (1.2, "0.100", "without, 1.20 s"),
    (0.0, "-", "without, made in the same run"),
])  # fmt: skip
def test_nothing_is_said_to_take_no_time(seconds: float, cell: str, caption: str) -> None:
    result = demo.Result(NAME, "demo model", 12, 2.4, seconds, steps_without=12)
    assert result.cells[5] == cell
    assert demo.sheet_row(result).cells[2][1] == caption


def test_no_tokens_are_no_line_of_the_sheet() -> None:
    result = demo.Result(NAME, "demo model", 12, 2.4, 1.2, steps_without=12)
    assert not any("tokens" in line for line in demo.sheet_row(result).lines)
    result.figures = {"tokens": [256, 16]}
    assert "256 + 16 condition tokens" in demo.sheet_row(result).lines
    result.figures = {"tokens": [], "references": {"tokens": 512}}
    assert "512 reference tokens" in demo.sheet_row(result).lines

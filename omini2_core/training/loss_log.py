"""The loss curve of a run, on disk and in numbers."""

import json
import math
import time
from pathlib import Path
from typing import Any

from ..errors import warn
from ..files import write_atomically


class LossLog:
    """The loss curve: ``loss.jsonl`` (one object a step) and TensorBoard."""

    def __init__(self, output: Path, start: int, writing: bool) -> None:
        self.losses: list[float] = []
        self.smoothed = math.nan
        self._file: Any = None
        self._board: Any = None
        path = output / "loss.jsonl"
        lines = path.read_text().splitlines() if start and path.is_file() else []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # cut short when the run was killed
                break
            if record["step"] > start:
                break
            self._smooth(record["loss"])
        if not writing:
            return
        # What came after the checkpoint is trained again.
        before = "".join(f"{line}\n" for line in lines[: len(self.losses)])
        write_atomically(path, before.encode(), "output")
        self._file = path.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            warn(
                "tensorboard is not installed, so there are no TensorBoard logs; install it with "
                "pip install tensorboard, or read loss.jsonl."
            )
        else:
            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=start + 1)

    def add(self, step: int, loss: float, rate: float) -> None:
        self._smooth(loss)
        if self._file is not None:
            record = {"step": step, "loss": round(loss, 6), "lr": rate, "time": round(time.time())}
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._board is not None:
            self._board.add_scalar("loss", loss, step)
            self._board.add_scalar("loss_smoothed", self.smoothed, step)
            self._board.add_scalar("lr", rate, step)

    def _smooth(self, loss: float) -> None:
        self.losses.append(loss)
        # As the original's log: 0.95 of the past.
        self.smoothed = loss if len(self.losses) == 1 else 0.95 * self.smoothed + 0.05 * loss

    def close(self) -> None:
        for each in (self._file, self._board):
            if each is not None:
                each.close()

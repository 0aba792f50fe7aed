"""A training run from config to LoRA files."""

import errno
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..errors import Omini2Error, warn
from .base import load_base, quantized
from .batches import Batch, Drawer
from .branch import ConditionedFlux
from .checkpoints import Checkpoint, last_checkpoint, remove_checkpoints, save_checkpoint
from .config import TrainConfig
from .encode import EncodedData, Share, Stopped, encode_data
from .encoders import Encoders, fingerprint_of, has_encoders, load_encoders
from .lora_file import (
    adapter_name,
    adapters,
    add_loras,
    lora_tensors,
    main_adapter,
    metadata,
    save_tensors,
    set_lora,
    with_alpha,
)
from .loss_log import LossLog
from .optimizer import load_whole_state, make_optimizer, rate_factor, whole_state
from .processes import make_accelerator, require_usable
from .progress import Progress
from .rising import FIRST, SAMPLES, Watch
from .sample import draw_samples, write_sheet

DISK_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
AVERAGED = 50  # steps of which the loss at start and end is the mean


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        loras: one file per condition; none if it stopped before its first step.
        steps: how many were trained, earlier parts of the run included.
        stopped: whether it was told to stop before its last step.
    """

    loras: list[Path]
    steps: int
    stopped: bool
    losses: list[float]


def train(
    config: TrainConfig,
    encoders: Encoders | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    accelerator: Accelerator | None = None,
) -> Result:
    """Trains the LoRAs of a config, going on from its last checkpoint.

    Args:
        encoders: text encoders and VAE that are loaded already; else the config names them.
        report: called after each picture and step on the main process.
        should_stop: asked before each step; a run that stops writes a checkpoint and its LoRAs.

    Raises:
        Omini2Error: something in the config can't be used, no usable image, a loss that isn't a
            number, or a full disk.
    """
    if encoders is None and not has_encoders(config):
        raise Omini2Error(
            "encoders: this base brings no text encoders and VAE; give clip_l, t5xxl and vae (the "
            "files that ComfyUI loads), or diffusers."
        )
    # A ComfyUI node calls this in inference mode, whose tensors can't be trained.
    with torch.inference_mode(False), torch.enable_grad():
        try:
            return _Run(config, encoders, report, should_stop, accelerator).run()
        except Stopped:
            return Result([], 0, True, [])
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise Omini2Error(
                f"output: there is no room left for {config.output} ({error}); make room on that "
                "disk and start again: the run goes on from the last checkpoint."
            ) from error


class _Run:
    def __init__(
        self,
        config: TrainConfig,
        encoders: Encoders | None,
        report: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        accelerator: Accelerator | None,
    ) -> None:
        self.begun = last_checkpoint(config) if config.resume else None
        self.config, self.encoders = _as_begun(config, self.begun), encoders
        self.report, self.should_stop = report, should_stop
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.accelerator = accelerator or make_accelerator()
        self.device = self.accelerator.device
        self.dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        self.output = config.output.expanduser()
        self.draws = config.samples.every > 0
        self.shared_out = self.accelerator.distributed_type == DistributedType.FSDP
        require_usable(self.accelerator, config)

    def run(self) -> Result:
        config, accelerator = self.config, self.accelerator
        data = self._encode()
        flux = load_base(config.base, self.dtype)
        flux = quantized(flux, config.quantize)
        add_loras(flux, config)
        checkpointing = config.gradient_checkpointing
        model = ConditionedFlux(flux, checkpointing, main_adapter(config)).train()
        if not self.shared_out:  # FSDP puts block by block on GPUs that can't hold them all
            model.to(self.device)
        names = adapters(config)
        drawer = Drawer(config, data)
        watch = self._watch(model, drawer)
        start, state = self._resume(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(config, parameters)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        parameters = [p for p in prepared.parameters() if p.requires_grad]  # FSDP makes new ones
        if state is not None:
            load_whole_state(optimizer, state)
        log = LossLog(self.output, start, accelerator.is_main_process)
        began, stopped, step = time.monotonic(), False, start
        try:
            while step < config.steps:
                if self._stops():
                    stopped = True
                    break
                loss = self._step(step, prepared, optimizer, parameters, drawer)
                step += 1
                log.add(step, loss, optimizer.param_groups[0]["lr"])
                if watch is not None:
                    watch.step(step)
                picture = None
                if self.draws and step % config.samples.every == 0:
                    picture = self._draw(model, data, step)
                if step % config.checkpoint_every == 0 or step == config.steps:
                    self._checkpoint(step, model, names, optimizer)
                self._report(step, start, began, log, picture)
        finally:
            log.close()
        if stopped and step > start:
            self._checkpoint(step, model, names, optimizer)
        files = self._save(step, model, names, data, log) if step else []
        return Result(files, step, stopped, log.losses)

    def _encode(self) -> EncodedData:
        config, accelerator = self.config, self.accelerator

        def encoders() -> Encoders:
            if self.encoders is None:
                self.encoders = load_encoders(config, self.device, self.dtype)
            return self.encoders

        given = self.encoders is not None
        data = encode_data(
            config,
            encoders,
            encoders().fingerprint if given else fingerprint_of(config),
            self.dtype,
            Share(
                accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
            ),
            self._report_encoded,
            # One process alone can't leave while the others wait for it.
            self.should_stop if accelerator.num_processes == 1 else lambda: False,
        )
        if self.draws and accelerator.is_main_process:
            encoders().release_text()
        else:
            if self.encoders is not None:
                self.encoders.release_text()
            self.encoders = None
        return data

    def _resume(self, model: nn.Module) -> tuple[int, dict[str, Any] | None]:
        if not self.config.resume:
            if self.accelerator.is_main_process:
                remove_checkpoints(self.config)
            self.accelerator.wait_for_everyone()
            return 0, None
        begun, self.begun = self.begun, None
        if begun is None:
            return 0, None
        if begun.step > self.config.steps:
            warn(f"steps: this run has {begun.step} already; raise steps to train it further.")
        for index, tensors in enumerate(begun.loras):
            set_lora(model, adapter_name(index), tensors)
        return begun.step, begun.optimizer

    def _step(
        self,
        step: int,
        model: Any,
        optimizer: Any,
        parameters: list[nn.Parameter],
        drawer: Drawer,
    ) -> float:
        """One optimiser step over all of its micro batches; returns the loss over all processes."""
        config, accelerator = self.config, self.accelerator
        processes, size = accelerator.num_processes, config.batch_size
        first = step * config.gradient_accumulation * processes * size
        optimizer.param_groups[0]["lr"] = config.optimizer.learning_rate * rate_factor(config, step)
        total = torch.zeros((), device=self.device)
        for micro in range(config.gradient_accumulation):
            at = first + (micro * processes + accelerator.process_index) * size
            batch = drawer.batch(range(at, at + size), self.device, step)
            last = micro == config.gradient_accumulation - 1
            with nullcontext() if last else accelerator.no_sync(model):
                loss = self._loss(model, batch) / config.gradient_accumulation
                accelerator.backward(loss)
            total += loss.detach()
        mean = float(accelerator.reduce(total, "mean"))
        if not math.isfinite(mean):
            raise Omini2Error(
                f"optimizer.lr: the loss at step {step + 1} is {mean}; lower the "
                "learning rate and start again: the run goes on from the last checkpoint."
            )
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return mean

    def _loss(self, model: Any, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
            velocity = model(
                batch.noisy,
                batch.text,
                batch.pooled,
                batch.time,
                batch.ids,
                batch.conditions,
                None,
                batch.kept,
                batch.text_kept,
            )
        return batch.loss(velocity)

    def _watch(self, model: nn.Module, drawer: Drawer) -> Watch | None:
        """For runs that are long enough; not under FSDP, where only a step makes blocks whole."""
        if self.config.steps < FIRST or self.shared_out:
            return None
        size = self.config.batch_size

        @torch.no_grad()
        def look() -> list[float]:
            starts = range(0, SAMPLES * size, size)
            batches = (drawer.batch(range(at, at + size), self.device) for at in starts)
            losses = torch.stack([self._loss(model, batch) for batch in batches])
            return [float(loss) for loss in self.accelerator.reduce(losses, "mean")]

        # A condition that fades in is the picture at first: its LoRA knows no other yet.
        return Watch(look, max(each.fade_steps for each in self.config.conditions))

    def _stops(self) -> bool:
        stop = self.should_stop()
        if self.accelerator.num_processes == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _draw(self, model: Any, data: EncodedData, step: int) -> Path | None:
        # Under FSDP a block is whole only while all processes go through it together.
        if not (self.accelerator.is_main_process or self.shared_out):
            return None
        with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
            rows = draw_samples(model, self.config, data, self.device)
        if self.shared_out:
            model.reshard()  # what is outside the blocks stays whole until a backward pass
        if not self.accelerator.is_main_process or self.encoders is None:
            return None
        return write_sheet(rows, self.encoders, self.output / "samples" / f"step-{step:08d}.png")

    def _checkpoint(self, step: int, model: nn.Module, names: list[str], optimizer: Any) -> None:
        loras = [lora_tensors(model, name) for name in names]
        state = whole_state(optimizer)
        if self.accelerator.is_main_process:
            save_checkpoint(self.config, step, loras, state)
        self.accelerator.wait_for_everyone()

    def _save(
        self, step: int, model: nn.Module, names: list[str], data: EncodedData, log: "LossLog"
    ) -> list[Path]:
        config, files = self.config, []
        summary = {
            "steps": step,
            "batch": config.batch_size
            * config.gradient_accumulation
            * self.accelerator.num_processes,
            "optimizer": f"{config.optimizer.type} {config.optimizer.learning_rate:g}",
            "images": len(data),
            "loss_start": _mean(log.losses[:AVERAGED]),
            "loss_end": _mean(log.losses[-AVERAGED:]),
        }
        for index, name in enumerate(names):
            tensors = lora_tensors(model, name)
            tensors = {k: v.to(self.dtype) for k, v in tensors.items()}
            tensors = with_alpha(tensors, config.rank, config.lora_alpha)
            path = self.output / f"{config.conditions[index].label}.safetensors"
            if self.accelerator.is_main_process:
                save_tensors(path, tensors, metadata(config, index, summary))
            files.append(path)
        self.accelerator.wait_for_everyone()
        return files

    def _report_encoded(self, count: int) -> None:
        if self.accelerator.is_main_process:
            self.report(Progress("encode", count, 0))

    def _report(
        self, step: int, start: int, began: float, log: "LossLog", picture: Path | None
    ) -> None:
        if not self.accelerator.is_main_process:
            return
        speed = (step - start) / max(time.monotonic() - began, 1e-9)
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = psutil.Process().memory_info().rss
        left = (self.config.steps - step) / speed
        self.report(
            Progress(
                "train",
                step,
                self.config.steps,
                log.losses[-1],
                log.smoothed,
                speed,
                left,
                memory,
                picture,
            )
        )


def _as_begun(config: TrainConfig, begun: Checkpoint | None) -> TrainConfig:
    """The config with the seed that its run was begun with: it decides what was drawn so far."""
    if begun is None or begun.seed == config.seed:
        return config
    warn(
        f"seed: the run in {config.output} goes on with its own, {begun.seed} instead of "
        f"{config.seed}; for another one choose another output, or set resume to false."
    )
    return config.model_copy(update={"seed": begun.seed})


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.5f}" if values else "none"

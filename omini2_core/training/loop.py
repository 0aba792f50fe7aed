"""A training run from config to LoRA files."""

import errno
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from ..errors import Omini2Error, warn
from ..files import write_atomically
from .base import load_base, quantized
from .batches import Drawer
from .branch import ConditionedFlux
from .checkpoints import last_checkpoint, remove_checkpoints, save_checkpoint
from .config import TrainConfig
from .encode import EncodedData, Share, Stopped, encode_data
from .encoders import Encoders, fingerprint_of, has_encoders, load_encoders
from .lora_file import (
    adapter_name,
    add_loras,
    lora_layers,
    lora_tensors,
    metadata,
    save_tensors,
    with_alpha,
)
from .sample import draw_samples, write_sheet

DISK_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
AVERAGED = 50  # steps of which the loss at start and end is the mean


@dataclass(frozen=True)
class Progress:
    """What a run says about itself after each step.

    Attributes:
        stage: "encode" (step counts samples; steps is 0) or "train".
        loss: of this step, and smoothed.
        seconds_left: to the last step.
        memory_bytes: the most that was taken on the GPU, or by the process now.
        picture: a sheet of sample pictures that was just drawn.
    """

    stage: str
    step: int
    steps: int
    loss: float = math.nan
    smoothed: float = math.nan
    steps_per_second: float = math.nan
    seconds_left: float = math.nan
    memory_bytes: int = 0
    picture: Path | None = None


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
        self.config, self.encoders = config, encoders
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
        model = ConditionedFlux(flux, config.gradient_checkpointing).train()
        if not self.shared_out:  # FSDP puts block by block on GPUs that can't hold them all
            model.to(self.device)
        adapters = [adapter_name(i) for i in range(len(config.conditions))]
        start, state = self._resume(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(config, parameters)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        parameters = [p for p in prepared.parameters() if p.requires_grad]  # FSDP makes new ones
        if state is not None:
            load_whole_state(optimizer, state)
        drawer = Drawer(config, data)
        log = _Log(self.output, start, accelerator.is_main_process)
        began, stopped, step = time.monotonic(), False, start
        try:
            while step < config.steps:
                if self._stops():
                    stopped = True
                    break
                loss = self._step(step, prepared, optimizer, parameters, drawer)
                step += 1
                log.add(step, loss, optimizer.param_groups[0]["lr"])
                picture = None
                if self.draws and step % config.samples.every == 0:
                    picture = self._draw(model, data, step)
                if step % config.checkpoint_every == 0 or step == config.steps:
                    self._checkpoint(step, model, adapters, optimizer)
                self._report(step, start, began, log, picture)
        finally:
            log.close()
        if stopped and step > start:
            self._checkpoint(step, model, adapters, optimizer)
        files = self._save(step, model, adapters, data, log) if step else []
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
        found = last_checkpoint(self.config)
        if found is None:
            return 0, None
        step, loras, state = found
        for index, tensors in enumerate(loras):
            set_lora(model, adapter_name(index), tensors)
        return step, state

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
                loss = batch.loss(velocity) / config.gradient_accumulation
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

    def _checkpoint(self, step: int, model: nn.Module, adapters: list[str], optimizer: Any) -> None:
        loras = [lora_tensors(model, adapter) for adapter in adapters]
        state = whole_state(optimizer)
        if self.accelerator.is_main_process:
            save_checkpoint(self.config, step, loras, state)
        self.accelerator.wait_for_everyone()

    def _save(
        self, step: int, model: nn.Module, adapters: list[str], data: EncodedData, log: "_Log"
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
        for index, adapter in enumerate(adapters):
            tensors = lora_tensors(model, adapter)
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
        self, step: int, start: int, began: float, log: "_Log", picture: Path | None
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


def make_accelerator() -> Accelerator:
    """Accelerate as this trainer needs it."""
    return Accelerator(
        # In the last block only keys and values of a condition matter, so some of its LoRA is
        # never used.
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            # While others wait, a process may encode many thousand pictures.
            InitProcessGroupKwargs(timeout=timedelta(hours=24)),
        ]
    )


def require_usable(accelerator: Accelerator, config: TrainConfig) -> None:
    """Refuses ways of starting several processes that would not train what the config says.

    Raises:
        Omini2Error: processes that don't know of each other, or a model that FSDP can't share out.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > accelerator.num_processes:
        raise Omini2Error(
            f"{started} processes were started, but accelerate finds no GPUs for them and each "
            "would train on its own; start one with python -m omini2_core.training CONFIG.yaml, "
            "or set ACCELERATE_USE_CPU=1 to try several on the CPU."
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise Omini2Error(
            "FSDP's first version can't share out a base with LoRAs; set fsdp_version to 2 in the "
            "file that accelerate is started with, as omini2_core/training/accelerate/fsdp.yaml "
            "has it."
        )
    if config.quantize != "none":
        raise Omini2Error(
            f"quantize: FSDP can't share out a base in {config.quantize}; set it to none, or "
            "start with omini2_core/training/accelerate/ddp.yaml, where each GPU holds all of it."
        )


def make_optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that a config names."""
    chosen = config.optimizer
    if chosen.type == "adamw":
        return torch.optim.AdamW(
            parameters, chosen.learning_rate, chosen.betas, weight_decay=chosen.weight_decay
        )
    from prodigyopt import Prodigy

    # As in the original's configs.
    optimizer: torch.optim.Optimizer = Prodigy(
        parameters,
        lr=chosen.learning_rate,
        betas=chosen.betas,
        weight_decay=chosen.weight_decay,
        use_bias_correction=True,
        safeguard_warmup=True,
    )
    return optimizer


def whole_state(optimizer: Any) -> dict[str, Any]:
    """An optimiser's state as one process has it; all processes have to ask for it together.

    Under FSDP each holds a part of every tensor. PyTorch's own ``get_optimizer_state_dict`` and its
    counterpart know neither weights without a gradient nor what Prodigy adds to its groups.
    """

    def whole(value: Any) -> Any:
        return value.full_tensor().cpu() if isinstance(value, DTensor) else value

    state: dict[str, Any] = tree_map(whole, optimizer.state_dict())
    return state


def load_whole_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Sets an optimiser's state from :func:`whole_state`, however many processes that had."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        if not isinstance(parameter, DTensor):
            continue
        for name, value in values.items():
            if isinstance(value, Tensor) and value.numel() == parameter.numel() > 1:
                # Prodigy keeps some of its state flat.
                like: Any = parameter if value.shape == parameter.shape else parameter.flatten()
                values[name] = distribute_tensor(value, like.device_mesh, like.placements)


def rate_factor(config: TrainConfig, step: int) -> float:
    """What the learning rate is multiplied by at a step, from 0."""
    warmup = config.optimizer.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.optimizer.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(config.steps - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


def set_lora(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Sets a LoRA's weights exactly as :func:`lora_tensors` gave them."""
    with torch.no_grad():
        for name, a, b in lora_layers(model, adapter):
            a.weight.copy_(tensors[f"transformer.{name}.lora_A.weight"])
            b.weight.copy_(tensors[f"transformer.{name}.lora_B.weight"])


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.5f}" if values else "none"


class _Log:
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
        kept = "".join(f"{line}\n" for line in lines[: len(self.losses)])
        write_atomically(path, kept.encode(), "output")
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

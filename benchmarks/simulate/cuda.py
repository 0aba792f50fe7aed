"""What PyTorch and ComfyUI ask of a CUDA device, answered for one that isn't there."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.simulate.device import Gpu


def pretend(gpu: Gpu) -> None:
    """From here on PyTorch has this device; before anything of ComfyUI is imported."""
    torch._C._ensureCUDADeviceGuardSet()  # indexing selects a device, which there is none of
    FakeTensorMode.avoid_device_init = property(lambda mode: True)
    fake_tensor.init_gpu_context = lambda device: None
    _answer(gpu)
    _streams(gpu)
    nn.Module._apply = _apply
    _attention()


def _answer(gpu: Gpu) -> None:
    card, c = gpu.card, torch.cuda
    for name, value in {
        "is_available": True, "is_initialized": True, "init": None, "_lazy_init": None,
        "device_count": 1, "current_device": 0, "set_device": None, "get_device_name": card.name,
        "get_device_capability": card.capability, "get_allocator_backend": "native",
        "is_bf16_supported": True, "empty_cache": None, "ipc_collect": None,
        "reset_peak_memory_stats": None,
        "get_device_properties": SimpleNamespace(
            name=card.name, major=card.capability[0], minor=card.capability[1],
            total_memory=card.total, multi_processor_count=100,
        ),
        "cudart": SimpleNamespace(
            cudaHostRegister=lambda *a: 1, cudaHostUnregister=lambda *a: 1,  # refuses to pin
        ),
    }.items():  # fmt: skip
        setattr(c, name, lambda *a, value=value, **k: value)
    c.mem_get_info = lambda device=None: (max(0, gpu.free), card.total)
    c.memory_allocated = lambda device=None: gpu.live
    c.max_memory_allocated = lambda device=None: gpu.tally.peak
    kinds = "active", "reserved", "allocated"
    c.memory_stats = lambda device=None: {f"{k}_bytes.all.current": gpu.live for k in kinds}
    c.synchronize = lambda device=None: gpu.wait("synchronize")


def _streams(gpu: Gpu) -> None:
    class Event:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        record = wait = lambda self, *args: None

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            gpu.wait("event.synchronize")

    class Stream:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.device = torch.device("cuda", 0)
            self.cuda_stream = 0

        wait_stream = wait_event = lambda self, other: None

        def record_event(self, event: Any = None) -> Any:
            return event or Event()

        def synchronize(self) -> None:
            gpu.wait("stream.synchronize")

        def query(self) -> bool:
            return True

        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *error: Any) -> None:
            pass

    @contextlib.contextmanager
    def stream(given: Any) -> Iterator[None]:
        yield

    computing = Stream()
    torch.cuda.Stream, torch.cuda.Event, torch.cuda.stream = Stream, Event, stream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: computing
    Tensor.record_stream = lambda t, stream: gpu.hold(t)


def _apply(module: Any, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Moves a module; PyTorch's own way swaps tensors in place, which fake ones don't allow."""
    for child in module.children():
        child._apply(function)
    with torch.no_grad():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                new = old if old is None else function(old)
                if new is not old:
                    held[name] = nn.Parameter(new, False) if held is module._parameters else new
    return module


def _attention() -> None:
    """A device has flash attention, and memory-efficient attention where there is a mask."""
    real, aten = nn.functional.scaled_dot_product_attention, torch.ops.aten

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if not isinstance(q, FakeTensor) or q.device.type != "cuda":
            return real(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
        given = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        if attn_mask is None:
            return aten._scaled_dot_product_flash_attention(q, k, v, **given)[0]
        if attn_mask.dtype == torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=q.dtype)
            attn_mask = zeros.masked_fill_(~attn_mask, float("-inf"))
        mask = attn_mask.expand(*q.shape[:3], k.shape[2])
        return aten._scaled_dot_product_efficient_attention(q, k, v, mask, False, **given)[0]

    nn.functional.scaled_dot_product_attention = attention
    backend = torch.backends.cuda
    backend.SDPAParams = lambda *given: given
    backend.can_use_flash_attention = backend.can_use_efficient_attention = lambda *a, **k: True

"""A CUDA device that isn't there: shapes, formats, devices, memory, waits and work, no numbers.

Tensors on "cuda" are PyTorch's FakeTensors, so that mixing devices raises as on a real one. Tensors
on the CPU are real, so whatever is computed there (masks, digests, files) is done. Of small tensors
on "cuda" (noise levels, ids, pooled text) the numbers are computed beside them on the CPU, so code
that reads them goes on, and each such read is a wait.
"""

import contextlib
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.simulate.card import Card, Kernel, Tally, Wait

SMALL = 1 << 14  # tensors of up to so many numbers have them
LARGE_ON_CPU = 1 << 22  # bytes; what is copied to the CPU beyond this stays without numbers
SMALL_COPY = 1 << 16  # bytes that CUDA takes along with the launch, whatever memory they are in
LEAD = 1024  # launches that Python may be ahead of the device
BLOCK = 512  # bytes that PyTorch's allocator counts in
NO_WORK = {
    "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias",
    "_reshape_alias", "lift_fresh", "_unsafe_view", "set_",
}  # fmt: skip
EMPTY = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
READS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item", "masked_select", "_unique2",
    "is_pinned",
}  # fmt: skip


class Gpu(TorchDispatchMode):
    """While it is entered, "cuda" is this device.

    Attributes:
        live: bytes that are taken.
        tally: what happened since the last :meth:`begin`.
        faults: what a real device would have failed at, or numbers that nobody knows.
        enforced: whether the card runs out of memory.
        before: is told of the bytes of each allocation before it.
        runs_out: is asked at each allocation whether that is the one without room.
    """

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card
        self.live = 0
        self.faults: list[str] = []
        self.enforced = False
        self.before: Callable[[int], None] = lambda n: None
        self.runs_out: Callable[[], bool] = lambda: False
        self.tally = Tally(0, 0)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages = WeakIdKeyDictionary()
        self._numbers = WeakIdKeyDictionary()
        self._launched = 0
        self._held: deque[tuple[int, Tensor]] = deque()
        self._everything = self._placing = False

    def __enter__(self) -> "Gpu":
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fake.__exit__(*error)

    @contextlib.contextmanager
    def without_numbers(self) -> Iterator[None]:
        """What is made on the CPU has none either: weights, which nobody looks at."""
        self._everything = True
        try:
            with self:
                yield
        finally:
            self._everything = False

    def begin(self) -> Tally:
        """A new tally."""
        self.tally = Tally(self.live, self.live)
        return self.tally

    @property
    def free(self) -> int:
        """Bytes that are not taken."""
        return self.card.usable - self.live

    def wait(self, why: str, n: int = 0) -> None:
        """Notes that the processor waits for the device."""
        self.tally.waits.append(Wait(why, n, place()))

    def hold(self, t: Tensor) -> None:
        """Another stream uses it: its memory is free when the device got there."""
        self._held.append((self._launched + LEAD, t))

    # --- operations ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        flat = tree_leaves((args, kwargs))
        faked = [t for t in flat if isinstance(t, FakeTensor)]
        devices = (torch.device(x) for x in flat if isinstance(x, torch.device))
        to = next(devices, None)
        pinned = kwargs.pop("pin_memory", False)
        here = to is not None and to.type == "cuda"
        if not (faked or here or pinned or self._everything):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if name == "_fused_rms_norm":
            return self._rms_norm(args)
        if name not in ("_to_copy", "copy_") and func._can_decompose():
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if name in READS:
            return self._read(func, name, args, kwargs)
        if name == "index" and any(_is_mask(i) for i in args[1]):
            self.wait("index by a mask")
            args = args[0], [self._places(i) if _is_mask(i) else i for i in args[1]]
        if name == "_to_copy" and to is not None:
            source = args[0]
            if source.device.type == "cuda" and to.type == "cpu":
                if not self._everything and source.nbytes <= LARGE_ON_CPU:
                    return self._to_cpu(source, kwargs)
                self._leaves(source, kwargs.get("non_blocking"), False)
            elif here and source.device.type == "cpu":
                self._arrives(source, kwargs.get("non_blocking"))
        if name == "copy_":
            self._copies(args, kwargs)
            if not isinstance(args[0], FakeTensor):
                numbers = self._numbers.get(args[1])
                with unset_fake_temporarily():
                    return args[0] if numbers is None else args[0].copy_(numbers)
        out = self._run(func, args, kwargs)
        outs = [o for o in tree_leaves(out) if isinstance(o, FakeTensor)]
        if outs:
            self._compute(func, name, args, kwargs, outs, flat)
            self._account(func, name, args, kwargs, out, outs, flat)
        if pinned and isinstance(out, FakeTensor):
            out.is_pinned_here = True
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        def fake(x: Any) -> Any:
            real = isinstance(x, Tensor) and not isinstance(x, FakeTensor)
            return self._fake.from_tensor(x) if real else x

        try:
            args, kwargs = tree_map(fake, (args, kwargs))
            return func(*args, **kwargs)
        except Exception as error:
            self.faults.append(f"{type(error).__name__}: {str(error)[:300]} [{func}] at {place()}")
            raise

    def _rms_norm(self, args: Any) -> tuple[Tensor, Tensor]:
        """One kernel on a real device, which reads what is contiguous."""
        x = args[0]
        with self:
            x = x.contiguous()
            out = torch.empty_like(x)
            shape = *x.shape[: x.ndim - len(args[1])], *[1] * len(args[1])
            deviation = torch.empty(shape, dtype=torch.float32, device=x.device)
        self._launch(0, 2 * x.nbytes, False)
        return out, deviation

    # --- numbers of small tensors ---

    def _known(self, t: Tensor) -> Tensor | None:
        return self._numbers.get(t) if isinstance(t, FakeTensor) else t

    def _compute(
        self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Any], flat: list[Any]
    ) -> None:
        tensors = [t for t in flat if isinstance(t, Tensor)]
        small = all(o.numel() <= SMALL for o in outs)
        if name in EMPTY:
            with unset_fake_temporarily():
                for o in outs if small else ():
                    self._numbers[o] = torch.zeros(o.shape, dtype=o.dtype)
            return
        # What new_zeros and its like are given is only their format.
        made = name.startswith("new_") or name.endswith("_like")
        known = made or all(self._known(t) is not None for t in tensors)
        if known and small and "rand" not in name:

            def real(x: Any) -> Any:
                if isinstance(x, FakeTensor):
                    numbers = self._numbers.get(x)
                    return torch.empty(x.shape, dtype=x.dtype) if numbers is None else numbers
                return torch.device("cpu") if isinstance(x, torch.device) else x

            with unset_fake_temporarily(), contextlib.suppress(RuntimeError, NotImplementedError):
                args, kwargs = tree_map(real, (args, kwargs))
                results = tree_leaves(func(*args, **kwargs))
                self._numbers.update(
                    zip(outs, (r for r in results if isinstance(r, Tensor)), strict=True)
                )
                return
        for o in outs:
            if any(o is t for t in tensors):  # written in place by what nobody knows
                self._numbers.pop(o, None)

    def _read(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        t = args[0]
        if name == "is_pinned":
            return getattr(t, "is_pinned_here", False)
        if t.device.type == "cuda":
            self.wait(name, t.nbytes)
        values = [self._known(a) if isinstance(a, Tensor) else a for a in args]
        if any(value is None for value in values):
            if name in ("is_nonzero", "equal"):
                return False
            where = place()
            if where.startswith("omini2_core"):  # the host looks whether a latent is all zeros
                self.faults.append(f"{name} of numbers that nobody knows at {where}")
            if name in ("_local_scalar_dense", "item"):
                return 0.5 if t.dtype.is_floating_point else 0
            raise RuntimeError(f"{name} of numbers that nobody knows at {where}")
        with unset_fake_temporarily():
            out = func(*values, **kwargs)
        if not isinstance(out, Tensor):
            return out
        with self:
            made = torch.empty(out.shape, dtype=out.dtype, device=t.device)
        self._numbers[made] = out
        return made

    def _places(self, mask: Tensor) -> Tensor:
        """Where a mask of one dimension is set, if anybody knows."""
        known = self._known(mask)
        with unset_fake_temporarily():
            return mask if known is None else known.nonzero()[:, 0]

    # --- copies between the two memories ---

    def _to_cpu(self, source: Tensor, kwargs: Any) -> Tensor:
        self._leaves(source, kwargs.get("non_blocking"), False)
        numbers = self._numbers.get(source)
        dtype = kwargs.get("dtype") or source.dtype
        with unset_fake_temporarily():
            if numbers is not None:
                return numbers.to(dtype, copy=True)
            return torch.empty(source.shape, dtype=dtype)  # never touched, so it takes no memory

    def _copies(self, args: Any, kwargs: Any) -> None:
        target, source = args[0], args[1]
        asked = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        where = target.device.type, source.device.type
        if where == ("cuda", "cpu") and source.ndim:
            self._arrives(source, asked)
        elif where == ("cpu", "cuda"):
            self._leaves(source, asked, getattr(target, "is_pinned_here", False))

    def _arrives(self, source: Tensor, asked: bool | None) -> None:
        self.tally.to_device += source.nbytes
        pinned = getattr(source, "is_pinned_here", False)
        if not asked:
            self.wait("blocking copy to the device", source.nbytes)
        elif not pinned and source.nbytes > SMALL_COPY:
            self.wait("copy to the device from memory that isn't pinned", source.nbytes)

    def _leaves(self, source: Tensor, asked: bool | None, pinned: bool) -> None:
        self.tally.from_device += source.nbytes
        if not (asked and pinned):
            self.wait("copy from the device", source.nbytes)

    # --- memory and work ---

    def _account(
        self, func: Any, name: str, args: Any, kwargs: Any, out: Any, outs: list[Any],
        flat: list[Any],
    ) -> None:  # fmt: skip
        outs = [o for o in outs if o.device.type == "cuda"]
        for o in outs:
            self._take(o.untyped_storage())
        if func.is_view or name in NO_WORK or not outs:
            return
        given = [t for t in flat if isinstance(t, Tensor) and t.device.type == "cuda"]
        moved = sum(map(_touched, given))
        if name not in ("copy_", "fill_", "zero_"):  # which don't read what they write to
            moved += sum(map(_touched, outs))
        packet = func.overloadpacket
        counted = flop_registry.get(packet)
        flops = counted(*args, **kwargs, out_val=out) if counted else 0
        self._launch(flops, moved, "attention" in name)

    def _take(self, storage: Any) -> None:
        if storage in self._storages:
            return
        if self._placing:
            self._storages[storage] = 0
            return
        n = -(-storage.nbytes() // BLOCK) * BLOCK
        tally = self.tally
        tally.allocations += 1
        self.before(n)
        if (self.enforced and self.free < n) or self.runs_out():
            raise torch.OutOfMemoryError(f"no room for {n >> 20} MiB at {place()}")
        self._storages[storage] = n
        self.take(n)
        weakref.finalize(storage, self.take, -n)

    def take(self, n: int) -> None:
        """Bytes that are taken, or given back."""
        self.live += n
        if self.live > self.tally.peak:
            self.tally.peak, self.tally.peak_at = self.live, place()

    def placed(self, n: int) -> Tensor:
        """A tensor of bytes that have been taken already."""
        self._placing = True
        try:
            return torch.empty(n, dtype=torch.uint8, device="cuda")
        finally:
            self._placing = False

    def _launch(self, flops: int, moved: int, attention: bool) -> None:
        self.tally.kernels.append(Kernel(flops, moved, attention))
        self._launched += 1
        while self._held and self._held[0][0] <= self._launched:
            self._held.popleft()


def place() -> str:
    """Where in the extension or the host something was asked for."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        for part in ("/omini2_core/", "/comfy/"):
            if part in path:
                file = path.rpartition(part)[2]
                return f"{part[1:]}{file}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _touched(t: Tensor) -> int:
    """Bytes that lie behind a tensor; what is expanded is read once."""
    n = t.element_size()
    for size, stride in zip(t.shape, t.stride(), strict=True):
        n *= size if stride else 1
    return n

"""Which memory a tensor of an emulated GPU would lie in, and what would make the host wait until the GPU is idle.

Emulated GPU tensors are CPU tensors, so `.item()` or a copy costs nothing here and all on a GPU. This notes for each storage whether it was
made on the device, on the host or in pinned host memory (a tensor made from any device tensor lies on the device) and logs every call that
waits on CUDA: reading a value, finding places of non-zeros, boolean masks, copies between host and device that are not both pinned and
non-blocking, and synchronisation by name. `Tensor.device` and `Tensor.is_cuda` answer truly meanwhile.

Sources: torch's `torch.cuda.set_sync_debug_mode` names the same operations (c10/cuda/CUDAFunctions.h, warn_or_error_on_sync); the CUDA
runtime's "API synchronization behavior" says that copies from pageable memory may wait, those from pinned memory do not.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megasora
from megasora.parallel import cpu
from megasora.parallel.cpu import CpuEvent, CpuStream
from tests.gpu_emulated import extension

Place = Literal["device", "host", "pinned"]
ROOTS = {
    "megasora": f"{Path(megasora.__file__).parent}/",
    "transformer_engine": "/te/transformer_engine/",
    **{name: f"/site-packages/{name}/" for name in ("megatron", "transformers", "diffusers")},
}
"""Whose calls are told apart, and where their files lie."""
WAITING = (
    *("_local_scalar_dense", "nonzero", "nonzero_static", "argwhere", "masked_select", "bincount", "equal", "is_nonzero", "allclose"),
    *("_unique2", "unique_dim", "unique_consecutive"),
)
"""Operations whose result, or its size, the host has to know."""
READING = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray)
GPU = torch.device("cuda", 0)


class HostWait(NamedTuple):
    """A call after which the host stands still until the GPU has done all it was given."""

    what: str
    package: str
    where: str
    """file:function:line of the innermost frame of a known package."""

    @property
    def function(self) -> str:
        """Without the line."""
        return self.where.rsplit(":", 1)[0]


class EmulatedMemory(TorchDispatchMode):
    """Notes where storages lie and logs waits while it is active (`watch`)."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[HostWait] = []
        self._lock = threading.Lock()
        self._places: dict[int, tuple[StorageWeakRef, Place]] = {}
        """By address; the weak reference keeps the address from being used again."""

    # --- where tensors lie

    def place(self, tensor: Tensor) -> Place | None:
        """Of a tensor; None when nothing is known (made inside autograd or a library's C++): such tensors are taken as they come."""
        known = self._places.get(tensor.untyped_storage()._cdata)
        return known[1] if known else None

    def on_device(self, tensor: Tensor) -> bool:
        return self.place(tensor) == "device"

    def put(self, value: Any, place: Place) -> Any:
        """Note that the tensors of a result lie in `place`."""
        with self._lock:
            for tensor in _tensors(value):
                storage = tensor.untyped_storage()
                self._places[storage._cdata] = (StorageWeakRef(storage), place)
            if len(self._places) > 20_000:
                self._places = {key: known for key, known in self._places.items() if not known[0].expired()}
        return value

    def log(self, what: str) -> None:
        """Note a wait of the main thread (another one waits for its own stream, and lets Python go on), unless it is in a kernel of the
        emulated extension."""
        if (origin := _origin()) is not None and threading.current_thread() is threading.main_thread():
            self.waits.append(HostWait(what, *origin))

    # --- below autograd: every operation, also in a backward pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run an operation, note where its results lie and whether it waits."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace != "aten":
            return result
        name = func.overloadpacket.__name__
        given = _tensors((args, kwargs))
        places = [self.place(tensor) for tensor in given]
        if "device" in places:
            self._check(name, args, given, places, non_blocking=_non_blocking(func, args, kwargs))
            if name != "copy_":  # which changes no storage's place
                self.put(result, "device")
        elif name != "copy_" and ("host" in places or "pinned" in places):
            for tensor in _tensors(result):
                if self.place(tensor) is None:
                    self.put(tensor, "host")
        return result

    def _check(self, name: str, args: Sequence[Any], given: list[Tensor], places: list[Place | None], *, non_blocking: bool) -> None:
        if name in WAITING or (name == "repeat_interleave" and len(given) == 1):
            self.log(name)
        elif name == "copy_":
            target, source = places[:2]
            if "device" in (target, source) and {"host", "pinned"} & {target, source}:
                self._copy(target, source, non_blocking=non_blocking)
        elif name in ("index", "index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_"):
            for index in _tensors(args[1]):
                if index.dtype in (torch.bool, torch.uint8):
                    self.log(f"{name} with a boolean mask")
                elif self.place(index) in ("host", "pinned"):
                    self.log(f"{name} with an index in host memory")
        elif any(place in ("host", "pinned") and tensor.dim() > 0 for tensor, place in zip(given, places, strict=True)):
            raise AssertionError(f"{name} of tensors on the host and on the device: CUDA refuses it ({_origin()})")

    def _copy(self, target: Place | None, source: Place | None, *, non_blocking: bool) -> None:
        if source == "device":
            if target != "pinned" or not non_blocking:
                self.log("copy to the host")
        elif source != "pinned" or not non_blocking:
            kind = "pinned" if source == "pinned" else "pageable"
            self.log(f"{'non-blocking' if non_blocking else 'blocking'} copy of {kind} memory to the device")

    # --- above autograd: what names a device

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """A call that the emulation's function mode saw; `run` does it on the CPU."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func == Tensor.device.__get__ and first is not None:
            return GPU if self.on_device(first) else run()
        if func == Tensor.is_cuda.__get__ and first is not None:
            return self.on_device(first)
        if func in (Tensor.to, Tensor.cpu) and first is not None:
            return self._move(func, first, args[1:], kwargs, run)
        if func is Tensor.pin_memory and first is not None:
            return self.put(run(), "pinned")
        if func is Tensor.is_pinned and first is not None:
            return self.place(first) == "pinned"
        if func in READING and first is not None and self.on_device(first):
            self.log(func.__name__)
        result = run()
        if _names_gpu(kwargs.get("device")):
            if func in FROM_DATA and not any(self.on_device(tensor) for tensor in _tensors(args)):
                self.log(f"torch.{func.__name__} on the device: a copy of pageable memory")
            return self.put(result, "device")
        if isinstance(result, Tensor) and not _tensors((args, kwargs)) and self.place(result) is None:
            self.put(result, "pinned" if kwargs.get("pin_memory") else "host")
        return result

    def _move(self, func: Any, tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        here: Place = "device" if self.on_device(tensor) else (self.place(tensor) or "host")
        to_gpu = self._target(func, args, kwargs)
        result = run()
        if to_gpu is None or to_gpu == (here == "device"):
            return result if self.place(result) else self.put(result, here)
        flags = [value for value in args if isinstance(value, bool)]
        self._copy(None, here, non_blocking=bool(kwargs.get("non_blocking", flags[0] if flags else False)))
        if result.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            result = result.clone()
        return self.put(result, "device" if to_gpu else "host")

    def _target(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool | None:
        """Whether a tensor is moved to the GPU; None when it stays."""
        if func is Tensor.cpu:
            return False
        for value in (*args, kwargs.get("device"), kwargs.get("other")):
            if isinstance(value, Tensor):
                return self.on_device(value)
            if isinstance(value, (torch.device, str)) or type(value) is int:
                return _names_gpu(value)
        return None


@contextmanager
def watch() -> Iterator[EmulatedMemory]:
    """Note where every tensor made from here on lies; for the ranks of the `gpus` fixture."""
    from tests.gpu_emulated import emulation

    memory = EmulatedMemory()
    by_name: list[tuple[Any, str]] = [(torch.cuda, "synchronize"), (CpuStream, "synchronize"), (CpuEvent, "synchronize")]
    real = [(owner, name, getattr(owner, name)) for owner, name in (*by_name, (Tensor, "cuda"))]
    for owner, name in by_name:
        setattr(owner, name, lambda *_args, label=f"{owner.__name__}.{name}", **_kwargs: memory.log(label))
    Tensor.cuda = lambda self, *_args, non_blocking=False, **_kwargs: self.to(GPU, non_blocking=non_blocking)  # type: ignore[method-assign]
    emulation.MODE.memory = memory
    try:
        with memory:
            yield memory
    finally:
        emulation.MODE.memory = None
        for owner, name, function in real:
            setattr(owner, name, function)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def _names_gpu(device: Any) -> bool:
    return str(device).split(":")[0] == "cuda" or type(device) is int


def _non_blocking(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    names = [argument.name for argument in func._schema.arguments]
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("non_blocking", False))


def _origin() -> tuple[str, str] | None:
    """(package, file:function:line) of the innermost frame in one of ROOTS; None inside a kernel of the emulated extension."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        if path == extension.__file__:
            return None
        package = next((name for name, root in ROOTS.items() if root in path), None)
        if package and path != cpu.__file__:
            return package, f"{path.rsplit(ROOTS[package], 1)[1]}:{function}:{frame.f_lineno}"
        frame = frame.f_back
    return "tests", "?:?:0"

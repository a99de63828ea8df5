"""The CPU backend: substitutions that let Megatron-core 0.16.1 run without CUDA, over gloo.

Megatron-core calls `torch.cuda` directly (device, streams, RNG state, `.cuda()`, `device="cuda"` keywords). `enable_cpu_backend`
replaces exactly those entry points by their CPU meaning, once per process and only when the chosen device is the CPU; a CUDA run
never imports the effects of this module. It changes no arithmetic: gloo moves the bytes, torch's CPU kernels compute.
What it leaves out: FP8, Transformer Engine, NCCL and CUDA graphs, which `config.validate` refuses on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class CpuStream:
    """A stream that is always finished: CPU work is synchronous."""

    cuda_stream = 0

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        """Accept and drop torch.cuda.Stream's arguments (device, priority): there is nothing to schedule."""

    def wait_stream(self, other: CpuStream) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: CpuEvent) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """Return an event that has already happened."""
        return event or CpuEvent()


class CpuEvent:
    """An event that has already happened."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        """Accept and drop torch.cuda.Event's arguments (timing, blocking)."""
        self._at = 0.0

    def record(self, stream: CpuStream | None = None) -> None:
        """It happens now."""
        self._at = time.perf_counter()

    def elapsed_time(self, end: CpuEvent) -> float:
        """Milliseconds to a later event."""
        return (end._at - self._at) * 1000

    def wait(self, stream: CpuStream | None = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It is done."""
        return True


class CpuDeviceMode(TorchFunctionMode):
    """Rewrites `device="cuda"` keywords to the CPU and lets `Tensor.type()` answer `torch.cuda.*`.

    The distributed optimizer asks `param.type()` whether a parameter is a CUDA tensor before it shards it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func` with CPU devices."""
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str) and len(args) == 1 and kwargs.get("dtype") is None:
            return result.replace("torch.", "torch.cuda.")
        return result


_mode: list[CpuDeviceMode] = []


def cpu_backend_enabled() -> bool:
    """Whether `enable_cpu_backend` has run in this process."""
    return bool(_mode)


def enable_cpu_backend() -> None:
    """Substitute Megatron-core's CUDA calls by CPU ones for the rest of the process.

    Raises:
        RuntimeError: torch has already started CUDA in this process; one process serves one device.
    """
    if cpu_backend_enabled():
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("CUDA is already in use in this process; start a new process for the CPU backend")
    _replace_cuda_functions()
    _replace_megatron_rng()
    _mode.append(CpuDeviceMode())
    _mode[0].__enter__()


def _replace_cuda_functions() -> None:
    """Each name gets a function object of its own: torch.compile keys its rules by object and refuses one under two names."""

    def answer(value: Callable[[], Any]) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: value()

    def nothing() -> None:
        return None

    replacements: dict[str, Callable[..., Any] | type] = {
        "current_device": answer(lambda: CPU),
        "device_count": answer(lambda: 1),
        "synchronize": answer(nothing),
        "empty_cache": answer(nothing),
        "set_device": answer(nothing),
        "reset_peak_memory_stats": answer(nothing),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": answer(torch.get_rng_state),
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        "current_stream": answer(CpuStream),
        "default_stream": answer(CpuStream),
        "stream": lambda stream: nullcontext(stream),
        "Stream": CpuStream,
        "Event": CpuEvent,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.nvtx.range_push = answer(nothing)
    torch.cuda.nvtx.range_pop = answer(nothing)
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign,assignment]


def _replace_megatron_rng() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

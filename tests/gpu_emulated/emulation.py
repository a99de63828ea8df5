"""An H200 that is not there: `--device cuda` on CPU tensors, with Transformer Engine's Python over the emulated extension.

Every setting takes its CUDA branch (`device.type == "cuda"`): Transformer Engine's layers, fused gradient accumulation, freed pipeline
outputs, FusedAdam. Tensors that are made on or moved to a CUDA device stay CPU tensors. NCCL is gloo.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megasora.parallel.cpu import CpuEvent, enable_cpu_backend

if TYPE_CHECKING:
    from tests.gpu_emulated.memory import EmulatedMemory

CPU = torch.device("cpu")
TE_FOLDER = Path(sys.prefix) / "te"
"""Where `make` puts Transformer Engine's Python: outside site-packages, or every CPU run would find it and miss its libraries."""
TRITON_FOLDER = Path(sys.prefix) / "triton"
"""Where it puts the Triton of the CUDA stack."""


class Properties:
    """What torch.cuda.get_device_properties says of an H200."""

    name = "NVIDIA H200"
    major, minor = 9, 0
    multi_processor_count = 132
    total_memory = 141 * 10**9


class EmulatedCudaMode(TorchFunctionMode):
    """Replaces CUDA devices by the CPU wherever a tensor is made or moved, given by keyword or in place."""

    memory: EmulatedMemory | None = None
    """Who notes which tensors would lie on the device, when somebody asked (`memory.watch`)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func` with CPU devices."""
        kwargs = kwargs or {}
        if func in (torch.autograd.backward, torch.Tensor.backward):
            given = {**dict(zip(("tensors", "grad_tensors"), args, strict=False)), **kwargs}
            return self._backward(given["tensors"], given.get("grad_tensors"))
        if func in (torch.device, torch._C._nn._parse_to):  # a name of a device is no tensor on it
            return func(*args, **kwargs)
        if self.memory is not None:
            return self.memory.call(func, args, kwargs, lambda: self._on_cpu(func, args, kwargs))
        return True if func == torch.Tensor.is_cuda.__get__ else self._on_cpu(func, args, kwargs)

    def _on_cpu(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0].clone()
        func = _KERNELS.get(func, func)
        changed = {name: CPU if name == "device" and isinstance(value, int) else _on_cpu(value) for name, value in kwargs.items()}
        changed.pop("pin_memory", None)
        return func(*map(_on_cpu, args), **changed)

    def _backward(self, tensors: Any, gradients: Any = None) -> None:
        """Run the engine with this mode on: inside a mode's own call it would be off, also for layers' backward code."""
        tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
        gradients = (gradients,) if isinstance(gradients, torch.Tensor) else tuple(gradients or [None] * len(tensors))
        gradients = tuple(torch.ones_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True))
        with self:
            torch.autograd.Variable._execution_engine.run_backward(
                tensors, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True
            )


def _flash_backward(*args: Any) -> Any:
    """torch's CUDA kernel takes (grad, q, k, v, out, lse, cu_q, cu_k, longest_q, longest_k, dropout, causal, seed, offset)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*args[:6], args[10], args[11])


def _cudnn_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: None, wants_lse: bool) -> Any:
    """(out, log-sum-exp [b, h, s, 1], ...), as torch's CUDA kernel gives them."""
    assert bias is None
    assert wants_lse
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse.unsqueeze(-1)


def _cudnn_backward(*args: Any) -> Any:
    """torch's CUDA kernel takes (grad, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, longest_q, longest_k, dropout, causal)."""
    grad, q, k, v, out, lse, _, _, bias, cu_q, cu_k, longest_q, longest_k, dropout, causal = args
    assert (bias, cu_q, cu_k, longest_q, longest_k) == (None, None, None, q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse.squeeze(-1), dropout, causal)


def _cudnn_takes(params: Any, debug: bool = False) -> bool:
    """What torch asks of inputs before it gives them to cuDNN on Hopper (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""
    lengths_and_size = (params.query.shape[2], params.key.shape[2], params.query.shape[3])
    return params.query.dtype in (torch.bfloat16, torch.float16) and min(lengths_and_size) > 1 and lengths_and_size[2] % 8 == 0


_KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._scaled_dot_product_cudnn_attention: _cudnn_forward,
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward: _cudnn_backward,
    torch.ops.aten._scaled_dot_product_flash_attention: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_backward: _flash_backward,
    torch.ops.aten._scaled_dot_product_efficient_attention: lambda q, k, v, *_: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v
    ),
}
"""CUDA kernels that are asked for by name, and the CPU's for the same; used where `Tensor.device` says cuda."""


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    return CPU if isinstance(value, str) and value.split(":")[0] == "cuda" else value


MODE = EmulatedCudaMode()
"""This process's; `emulate` enters it."""


def emulate() -> None:
    """Turn this process into a rank with an H200, before Megatron or Transformer Engine is imported.

    Raises:
        RuntimeError: Transformer Engine's Python is not installed for the tests.
    """
    if not (TE_FOLDER / "transformer_engine").is_dir():
        raise RuntimeError(f"{TE_FOLDER} lacks Transformer Engine's Python: make test installs it")
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its package then looks for no shared library
    sys.path.insert(0, str(TE_FOLDER))
    from tests.gpu_emulated import extension

    extension.install()
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None  # it is in sys.modules already
    for name in ("onnx_extensions", "triton.pad", "permutation", "cross_entropy"):  # need onnxscript or Triton at import
        module = f"transformer_engine.pytorch.{name}"
        sys.modules[module] = extension.RefusingModule(module)
    torch.cuda.is_available = lambda: True  # Transformer Engine asks while it is imported
    _become_gpu()
    _replace_wrappers()
    _replace_rng()
    _replace_threads()
    MODE.__enter__()


def emulate_with_apex() -> None:
    """Turn this process into a rank with an H200 where apex is installed and Transformer Engine is not."""
    from tests.gpu_emulated import apex

    apex.install()
    _become_gpu()
    _replace_threads()
    MODE.__enter__()


def emulate_with_triton() -> None:
    """Turn this process into a rank with an H200 and Triton, whose kernels then run on CPU tensors, statement by statement in numpy.

    Elsewhere in these tests Triton is not installed, for its interpreter takes tens of milliseconds a token.

    Raises:
        RuntimeError: Triton is not installed for the tests.
    """
    if not (TRITON_FOLDER / "triton").is_dir():
        raise RuntimeError(f"{TRITON_FOLDER} lacks Triton: make test installs it")
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(TRITON_FOLDER))
    _mend_interpreter()
    emulate()


class Runtime:
    """The CUDA runtime's calls that page-lock memory, which all memory here is as good as."""

    @staticmethod
    def cudaHostRegister(address: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        """Success."""
        return 0

    @staticmethod
    def cudaHostUnregister(address: int) -> int:  # noqa: N802 - CUDA's name
        """Success."""
        return 0


def _become_gpu() -> None:
    enable_cpu_backend()  # streams, events, RNG states
    _replace_cuda_queries()
    _replace_nccl()


def _replace_cuda_queries() -> None:
    answers: dict[str, Any] = {
        "is_available": True,
        "current_device": 0,
        "is_current_stream_capturing": False,
        "get_device_capability": (9, 0),
        "get_device_name": Properties.name,
        "get_device_properties": Properties,
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "cudart": Runtime,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_args, answer=answer, **_kwargs: answer)
    torch.cuda.graphs.is_current_stream_capturing = lambda: False
    torch.backends.cuda.can_use_cudnn_attention = _cudnn_takes
    torch.version.cuda = "13.0"
    torch.Tensor.record_stream = lambda _self, _stream: None  # type: ignore[method-assign,assignment]


def _replace_nccl() -> None:
    real = dist.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        real("gloo" if backend == "nccl" else backend, *args, **kwargs)

    dist.init_process_group = init_process_group
    # several collectives in one launch, which gloo does not have: one after another
    torch.distributed._coalescing_manager = lambda **_kwargs: nullcontext(CpuEvent())


def _replace_wrappers() -> None:
    """Quantised tensors are made by a static method that no function mode sees."""
    real = torch.Tensor._make_wrapper_subclass

    def make(cls: type, shape: Any, *args: Any, **kwargs: Any) -> Any:
        return real(cls, shape, *args, **{**kwargs, "device": CPU})

    torch.Tensor._make_wrapper_subclass = staticmethod(make)


def _replace_threads() -> None:
    """Function modes belong to a thread: each thread enters this process's."""
    real = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with MODE, MODE.memory or nullcontext():
            real(thread)

    threading.Thread.run = run  # type: ignore[method-assign]


def _replace_rng() -> None:
    from transformer_engine.pytorch import distributed

    distributed._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)


def _mend_interpreter() -> None:
    """Where Triton 3.6's interpreter is not what a GPU does: it reads the bounds of a loop with int(array of one element), which numpy 2.4
    refuses (3.9 squeezes first), and cuts fp32 off to bf16 where a GPU rounds to the nearest, ties to even."""
    from triton.runtime import interpreter

    patch_tensor, convert = interpreter._patch_lang_tensor, interpreter._convert_float

    def patch(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def rounded(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(values, source, target, rounding)
        bits = numpy.ascontiguousarray(values).view(numpy.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)

    interpreter._patch_lang_tensor = patch
    interpreter._convert_float = rounded

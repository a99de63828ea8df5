"""What takes a GPU's place in a dry run. Everything that is not listed here is the code of a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import clip_grads
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import layers, mappings
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from megasora.models.mmdit import build, model, offload, recompute
from megasora.models.mmdit.kernels.fused import FUSED
from megasora.parallel import attention_kernels
from megasora.parallel import context as context_parallel
from megasora.parallel.pack import AttentionOrder
from megasora.scaling.dryrun.recorder import Recorder
from megasora.training import optimizer as training_optimizer
from megasora.training.fully_sharded import FullyShardedAdam

STAND_INS = (
    "fake tensors on the CPU: sizes are a GPU's, nothing is computed; one rank of a fake process group, nothing is sent",
    "linear layers are Megatron-core's own with Transformer Engine's memory: tokens gathered over TP are freed after use",
    "attention keeps what Transformer Engine's kernel keeps: q, k, v, its result, one fp32 number per token and head; "
    "ring attention is the run's own over the CPU's kernel",
    "the Triton kernels are asked for their outputs, not run",
    "numbers that a host would read (loss, gradient norm, number of samples) are 1",
    "Adam is torch's, in place, as Transformer Engine's is",
    "host memory of offloaded inputs is left out",
)
"""For the report."""


_Count = Callable[[int], None]
_Make = Callable[[Tensor], Tensor]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, flops: int, count: _Count, make: _Make) -> Tensor:  # type: ignore[override]
        out = make(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device))
        ctx.flops, ctx.count, ctx.make = flops, count, make
        count(flops)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad.contiguous()
        ctx.count(2 * ctx.flops)
        return *(ctx.make(tensor) for tensor in ctx.saved_tensors[:3]), None, None, None


def attention(count: _Count, *, make: _Make = torch.empty_like) -> Callable[[Tensor, Tensor, Tensor, AttentionOrder], Tensor]:
    """A kernel that allocates and keeps what Transformer Engine's does.

    Args:
        count: told the FLOPs of each pass: 4 x length^2 x head size for each sample and head, twice as much backward.
        make: a tensor like another; zeros where the numbers are read (real tensors under FP8).
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, order: AttentionOrder) -> Tensor:
        flops = 4 * q.shape[1] * q.shape[2] * sum(length**2 for length in order.lengths)
        out: Tensor = _Attention.apply(*(x.contiguous() for x in (q, k, v)), flops, count, make)
        return out

    return attend


@contextmanager
def gpu_stand_ins(recorder: Recorder) -> Iterator[None]:
    """Put them in place; afterwards everything is as before."""
    with ExitStack() as stack:
        for patch in (*_kernels(recorder), *_megatron(recorder), *_fully_sharded(recorder)):
            stack.enter_context(patch)
        stack.enter_context(recorder.timeline.following_resizes())
        yield


def _kernels(recorder: Recorder) -> Iterator[Any]:
    yield mock.patch.object(build, "choose_kernel", return_value=attention(recorder.products.attention))
    yield mock.patch.object(build, "choose_kernels", return_value=FUSED)
    yield mock.patch.object(nn.utils, "skip_init", lambda kind, *args, **kwargs: kind(*args, **kwargs))  # it swaps real tensors in
    yield mock.patch.object(context_parallel, "chunk_forward", _of_chunks(attention_kernels.chunk_forward, recorder, factor=4))
    yield mock.patch.object(context_parallel, "chunk_backward", _of_chunks(attention_kernels.chunk_backward, recorder, factor=8))
    yield mock.patch.object(model, "keep_inputs_only", _recomputing(recompute.keep_inputs_only, recorder))
    yield mock.patch.object(recompute._Refill, "__call__", _during_recompute(recompute._Refill.__call__, recorder))
    yield mock.patch.object(offload, "host_memory", _not_counted(offload.host_memory, recorder))


def _of_chunks(real: Callable[..., Any], recorder: Recorder, *, factor: int) -> Callable[..., Any]:
    def counted(*tensors: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int], **rest: Any) -> Any:
        heads = tensors[-1].shape[1] * tensors[-1].shape[2]
        recorder.products.attention(factor * heads * sum(q * k for q, k in zip(q_lengths, k_lengths, strict=True)))
        with recorder.place.attending():
            return real(*tensors, q_lengths=q_lengths, k_lengths=k_lengths, **rest)

    return counted


def _recomputing(real: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    """A block that keeps its inputs only: its second forward pass is within a backward pass."""

    def keep(run: Callable[..., Any], *tensors: Tensor, **settings: Any) -> Any:
        def either(*inputs: Tensor) -> Any:
            if recorder.place.phase != "backward":
                return run(*inputs)
            with recorder.place.during("recompute"):
                return run(*inputs)

        return real(either, *tensors, **settings)

    return keep


def _not_counted(real: Callable[[Tensor], Tensor], recorder: Recorder) -> Callable[[Tensor], Tensor]:
    """Host memory is none of the device's; it is held to the end, so that no other storage gets an address that is not counted."""
    held: list[Tensor] = []

    def make(like: Tensor) -> Tensor:
        held.append(real(like))
        recorder.timeline.ignore(held[-1:])
        return held[-1]

    return make


def _during_recompute(real: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    def call(self: Any, gradient: Tensor) -> None:
        with recorder.place.during("recompute"):
            real(self, gradient)

    return call


class _FreshMemory:
    """In place of Megatron's buffer that gathered tokens share for good: Transformer Engine gathers into memory that is free again."""

    def get_tensor(self, shape: Sequence[int], dtype: torch.dtype, _name: str, mem_alloc_context: Any = None) -> Tensor:
        return torch.empty(list(shape), dtype=dtype)


def _megatron(recorder: Recorder) -> Iterator[Any]:
    for module in (layers, mappings):
        yield mock.patch.object(module, "get_global_memory_buffer", _FreshMemory)
    yield mock.patch.object(schedules, "forward_step", recorder.passes("forward", schedules.forward_step))
    yield mock.patch.object(schedules, "backward_step", recorder.passes("backward", schedules.backward_step))
    yield mock.patch.object(P2PCommunicator, "_communicate", _between_stages(P2PCommunicator._communicate, recorder))
    yield mock.patch.object(torch.distributed, "all_gather_object", _all_say_the_same)
    yield mock.patch.object(clip_grads, "multi_tensor_applier", lambda op, _flag, lists, *rest: op(lists, *rest))
    yield mock.patch.object(clip_grads, "l2_norm_impl", _norm_of)
    yield mock.patch.object(clip_grads, "multi_tensor_scale_impl", _scale)
    for module in (megatron_optimizer, training_optimizer):
        yield mock.patch.object(module, "USING_PYTORCH_OPTIMIZER", True)


def _between_stages(real: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    def communicate(self: Any, *, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, **rest: Any) -> Any:
        with recorder.place.allocating("messages"):
            result = real(self, tensor_send_next=tensor_send_next, tensor_send_prev=tensor_send_prev, **rest)
        ends = (
            ("send", tensor_send_next, "forward"),
            ("send", tensor_send_prev, "backward"),
            ("receive", result[0], "forward"),
            ("receive", result[1], "backward"),
        )
        for kind, tensor, phase in ends:
            recorder.messages.between_stages(kind, tensor, phase, group=self.pp_group)  # type: ignore[arg-type]
        return result

    return communicate


def _norm_of(lists: Sequence[Sequence[Tensor]], _per_tensor: bool) -> tuple[Tensor, None]:
    """Transformer Engine's norm of many tensors: one pass over them."""
    for tensor in lists[0]:
        tensor.sum()
    return torch.empty(1), None


def _scale(lists: Sequence[Sequence[Tensor]], _factor: float) -> None:
    """Transformer Engine's scaling of many tensors: one pass, in place."""
    for tensor in lists[0]:
        tensor.mul_(1.0)


def _all_say_the_same(gathered: list[Any], mine: Any, group: Any = None) -> None:
    """Megatron's optimizer compares the names of its parameter groups over ranks; they agree."""
    gathered[:] = [mine] * len(gathered)


def _fully_sharded(recorder: Recorder) -> Iterator[Any]:
    real_mesh, real_gather = DeviceMesh.from_group, FSDPParam.init_all_gather_outputs

    def mesh_of(*args: Any, **kwargs: Any) -> DeviceMesh:
        with unset_fake_temporarily():  # it looks itself up by value
            return real_mesh(*args, **kwargs)

    def gather(self: FSDPParam, *args: Any, **kwargs: Any) -> None:
        with recorder.place.allocating("gathered weights"):
            real_gather(self, *args, **kwargs)

    yield mock.patch.object(DeviceMesh, "from_group", staticmethod(mesh_of))
    yield mock.patch.object(FSDPParam, "init_all_gather_outputs", gather)
    yield mock.patch.object(_fsdp_param_group, "foreach_reduce", _reducing(_fsdp_collectives.foreach_reduce, recorder))
    yield mock.patch.object(FullyShardedAdam, "_check_memory", return_value=None)  # it compares addresses


def _reducing(real: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    def reduce(*args: Any, **kwargs: Any) -> Any:
        with recorder.place.allocating("gradients"):
            return real(*args, **kwargs)

    return reduce

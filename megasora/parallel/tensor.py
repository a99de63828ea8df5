"""Tensor-parallel regions that Megatron-core does not have as we need them: contiguous backwards, and a gather of the last dim."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class _CopyToRegion(torch.autograd.Function):
    """Identity forward, all-reduce backward (Megatron's skips non-contiguous gradients in silence)."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group  # type: ignore[attr-defined]
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)  # type: ignore[attr-defined]
        return grad, None


class _GatherLastDim(torch.autograd.Function):
    """All-gather of the last dim forward; backward sums the ranks' gradients and returns this rank's slice (reduce-scatter)."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group  # type: ignore[attr-defined]
        size = group.size()
        rows, columns = tensor.shape
        gathered = tensor.new_empty(size * rows, columns)
        dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
        return gathered.view(size, rows, columns).transpose(0, 1).reshape(rows, size * columns)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        group = ctx.group  # type: ignore[attr-defined]
        rows, columns = grad.shape
        columns //= group.size()
        by_rank = grad.view(rows, group.size(), columns).transpose(0, 1).contiguous()
        own = grad.new_empty(rows, columns)
        dist.reduce_scatter_tensor(own, by_rank.view(-1, columns), group=group)
        return own, None


def copy_to_tensor_region(tensor: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """`tensor`, replicated over TP, entering a region where each rank uses it differently: gradients are summed over TP."""
    if group.size() == 1:
        return tensor
    result: Tensor = _CopyToRegion.apply(tensor, group)  # type: ignore[no-untyped-call]
    return result


def gather_last_dim(tensor: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """[n, c] per rank -> [n, c x TP] on every rank, for use on tokens that are split over TP (backward: reduce-scatter)."""
    if group.size() == 1:
        return tensor
    result: Tensor = _GatherLastDim.apply(tensor, group)  # type: ignore[no-untyped-call]
    return result

"""Context parallelism: attention whose tokens are spread over ranks.

**Ulysses**: an all-to-all turns "all heads of my tokens" into "my heads of all tokens", a kernel that knows nothing of it runs, and a
second all-to-all turns back. It needs only equal shares and (heads of a TP rank) % U == 0. **Ring**: keys and values travel around the
ring, each chunk's result is merged by its log-sum-exp. CP = U x R runs Ulysses inside and the ring across. With CP = 1 nothing is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megasora.parallel.attention_kernels import ChunkResult, Kernel, chunk_backward, chunk_forward
from megasora.parallel.groups import ContextGroups
from megasora.parallel.pack import AttentionOrder, HeadRows, Pack


class _AllToAll(torch.autograd.Function):
    """Equal all-to-all over dim 0, which counts the ranks; its own inverse, so the backward is the same exchange."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group  # type: ignore[attr-defined]
        return _exchange(tensor, group)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _exchange(grad, ctx.group), None  # type: ignore[attr-defined]


def _swap(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[G, N, ...]: part g goes to member g, and part g comes from it."""
    result: Tensor = _AllToAll.apply(tensor, group)  # type: ignore[no-untyped-call]
    return result


def _exchange(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    tensor = tensor.contiguous()
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received, tensor, group=group)
    return received


class _Ring(torch.autograd.Function):
    """Attention of this rank's queries over the keys of every ring member, in attention order."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, lengths: tuple[tuple[int, ...], ...]
    ) -> Tensor:
        rank, size = group.rank(), group.size()
        merged: ChunkResult | None = None
        chunk = torch.stack([k, v])
        for step in range(size):
            hop = _pass_on(chunk, group) if step < size - 1 else None
            part = chunk_forward(q, chunk[0], chunk[1], q_lengths=lengths[rank], k_lengths=lengths[(rank - step) % size])
            merged = part if merged is None else _merge(merged, part)
            chunk = chunk if hop is None else hop.arrive()
        assert merged is not None, "a ring has at least one member"
        out = merged.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, merged.lse)
        ctx.group, ctx.lengths = group, lengths  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        group, lengths = ctx.group, ctx.lengths  # type: ignore[attr-defined]
        rank, size = group.rank(), group.size()
        chunk = torch.stack([k, v])
        grad_q = torch.zeros_like(q, dtype=lse.dtype)
        grad_chunk = torch.zeros_like(chunk, dtype=lse.dtype)
        travelling: _Hop | None = None
        for step in range(size):
            hop = _pass_on(chunk, group) if step < size - 1 else None
            parts = chunk_backward(
                grad,
                q,
                chunk[0],
                chunk[1],
                merged=ChunkResult(out, lse),
                q_lengths=lengths[rank],
                k_lengths=lengths[(rank - step) % size],
            )
            grad_q += parts[0]
            if travelling is not None:  # what the members before have added for this chunk came while its own part was computed
                grad_chunk = travelling.arrive()
            grad_chunk[0] += parts[1]
            grad_chunk[1] += parts[2]
            chunk = chunk if hop is None else hop.arrive()
            if size > 1:  # gradients follow their keys around and after `size` hops are home
                travelling = _pass_on(grad_chunk, group)
        if travelling is not None:
            grad_chunk = travelling.arrive()
        return grad_q.to(q.dtype), grad_chunk[0].to(k.dtype), grad_chunk[1].to(v.dtype), None, None


@dataclass(frozen=True, kw_only=True)
class _Hop:
    """A tensor on its way to the next ring member, and the previous one's on its way here."""

    handles: list[dist.Work]
    sent: Tensor
    """Kept: its memory must not be used again before it has left."""
    received: Tensor

    def arrive(self) -> Tensor:
        """What was received; the current stream (on the CPU: this thread) goes on when both messages are through."""
        for handle in self.handles:
            handle.wait()
        return self.received


def _pass_on(tensor: Tensor, group: dist.ProcessGroup) -> _Hop:
    """Start sending `tensor` to the next ring member and receiving the previous one's."""
    rank, size = group.rank(), group.size()
    sent, received = tensor.contiguous(), torch.empty_like(tensor)
    following, previous = dist.get_global_rank(group, (rank + 1) % size), dist.get_global_rank(group, (rank - 1) % size)
    send = dist.P2POp(dist.isend, sent, following, group)
    receive = dist.P2POp(dist.irecv, received, previous, group)
    return _Hop(handles=dist.batch_isend_irecv([send, receive]), sent=sent, received=received)


def _merge(a: ChunkResult, b: ChunkResult) -> ChunkResult:
    """Attention over the union of two disjoint sets of keys (log-sum-exp merge, accumulated in the lse's dtype)."""
    lse = torch.logaddexp(a.lse, b.lse)
    weight_a, weight_b = (torch.exp(part.lse - lse).unsqueeze(-1) for part in (a, b))
    return ChunkResult(a.out * weight_a + b.out * weight_b, lse)


class ContextAttention:
    """Attention over a pack whose tokens are spread over a context group.

    Args:
        groups: the Ulysses and ring factors of the context group.
        kernel: attention over whole samples; used when the ring has one member.
    """

    def __init__(self, *, groups: ContextGroups, kernel: Kernel) -> None:
        self.groups = groups
        self.kernel = kernel

    def rows(self, pack: Pack) -> HeadRows:
        """Where this rank's tokens go in the N of `q`, `k`, `v`: to attention's order, or with Ulysses to joint order, which it sorts."""
        return pack.head_rows(None if self.num_groups > 1 else self.groups.members[self.groups.ring_rank])

    @property
    def num_groups(self) -> int:
        """G, the groups that heads are held in: Ulysses sends each to another rank."""
        return self.groups.ulysses_size

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
        """Attend.

        Args:
            q, k, v: [G, N, heads / G, head size], this context rank's tokens and TP rank's heads, placed as `rows` says.
            pack: whose samples they are.

        Returns:
            The same shape and order.
        """
        if self.num_groups == 1:
            return self._attend(q[0], k[0], v[0], self._orders(pack)).unsqueeze(0)
        group = self.groups.ulysses
        orders = self._orders(pack)
        own = orders[self.groups.ring_rank]
        q, k, v = (_reorder(_swap(x, group).flatten(0, 1), own.index, own.inverse) for x in (q, k, v))
        out = _reorder(self._attend(q, k, v, orders), own.inverse, own.index)
        return _swap(out.unflatten(0, (self.num_groups, -1)), group)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, orders: list[AttentionOrder]) -> Tensor:
        if len(orders) == 1:
            return self.kernel(q, k, v, orders[0])
        result: Tensor = _Ring.apply(q, k, v, self.groups.ring, _equal_lengths(orders))  # type: ignore[no-untyped-call]
        return result

    def _orders(self, pack: Pack) -> list[AttentionOrder]:
        """The order of each ring member's tokens."""
        return [pack.attention_order(cp_ranks) for cp_ranks in self.groups.members]


class _Permute(torch.autograd.Function):
    """Rows in another order; the backward gathers by the inverse (index_select's own backward would scatter with atomics)."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, index: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(inverse)
        return tensor.index_select(0, index)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad.index_select(0, inverse), None, None


def _reorder(tensor: Tensor, index: Tensor | None, inverse: Tensor | None) -> Tensor:
    if index is None:
        return tensor
    result: Tensor = _Permute.apply(tensor, index, inverse)  # type: ignore[no-untyped-call]
    return result


def _equal_lengths(orders: list[AttentionOrder]) -> tuple[tuple[int, ...], ...]:
    """Lengths per ring member, all with as many entries (a member may hold none of the dummy)."""
    longest = max(len(order.lengths) for order in orders)
    return tuple(order.lengths + (0,) * (longest - len(order.lengths)) for order in orders)

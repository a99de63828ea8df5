"""Bytes and number of collectives by kind, group and place, and whether they can run beside computation.

The convention of `perf.collectives`: the payload on the rank. Of a coalesced call all tensors count. A group of one rank sends nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork  # type: ignore[attr-defined]
from torch.utils._pytree import tree_iter

from megasora.parallel.groups import ParallelContext
from megasora.scaling.dryrun.place import Phase, Place

KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "recv_": "receive",
    "broadcast_": "broadcast",
}
"""c10d operators."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """Collectives of one kind on one group in one phase."""

    kind: str
    group: str
    group_size: int
    ranks: tuple[int, ...]
    """Of this rank's group."""
    phase: Phase
    """Where it starts; a message between stages belongs to the pass whose tensor it carries."""
    overlaps: bool
    """Whether it can run beside computation."""
    count: int
    bytes: int


class Messages:
    """Counts what is sent.

    Args:
        place: where the step is.
        context: whose groups.
        overlapping: groups whose messages run beside computation in a phase.
    """

    def __init__(self, place: Place, *, context: ParallelContext, overlapping: frozenset[tuple[str, Phase]]) -> None:
        self.place, self.overlapping = place, overlapping
        self.counts: Counter[tuple[str, str, Phase]] = Counter()
        self.bytes: Counter[tuple[str, str, Phase]] = Counter()
        self.ranks: dict[str, tuple[int, ...]] = {}
        self._names = _group_names(context)

    def see(self, func: Any, args: tuple[Any, ...], *, counted: bool) -> Any:
        """Count a c10d call and answer it: its tensors stay as they are, and it is done at once."""
        name = func._schema.name.removeprefix("c10d::")
        group = _group_of(args) if counted and name in KINDS else None
        if group is not None and group.size() > 1:
            self._count(name, group, args)
        work = FakeWork().boxed()
        return (args[0], work) if len(func._schema.returns) == 2 else work

    def _count(self, name: str, group: Any, args: tuple[Any, ...]) -> None:
        tensors = [leaf for leaf in tree_iter(args) if isinstance(leaf, Tensor)]
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        size = max(sizes, default=0)
        if "coalesced" in name:
            sides = [sum(t.numel() * t.element_size() for t in tree_iter(side) if isinstance(t, Tensor)) for side in args[:2]]
            size = max(sides)
        ranks = tuple(dist.get_process_group_ranks(group))
        where = self._names.get(group.group_name) or self._names.get(ranks, "other")
        if name in ("send", "recv_") and where != "ring":
            return  # between stages: see `between_stages`; with two of them Megatron sends one way in the world's group
        phase = self.place.phase
        if phase == "step end" and self.place.scheduled:  # started between two passes
            phase = "forward" if KINDS[name] == "all_gather" else "backward"
        self._add(KINDS[name], where, phase, size)
        self.ranks[where] = ranks

    def between_stages(self, kind: str, tensor: Tensor | None, phase: Phase, *, group: dist.ProcessGroup) -> None:
        """Count a message between stages: activations are the forward passes', gradients the backward passes'."""
        if tensor is not None:
            self._add(kind, "pp", phase, tensor.numel() * tensor.element_size())
            self.ranks["pp"] = tuple(dist.get_process_group_ranks(group))

    def _add(self, kind: str, group: str, phase: Phase, size: int) -> None:
        self.counts[kind, group, phase] += 1
        self.bytes[kind, group, phase] += size

    def result(self) -> tuple[Message, ...]:
        """Everything, the largest first."""
        found = [
            Message(
                kind=kind,
                group=group,
                group_size=len(self.ranks[group]),
                ranks=self.ranks[group],
                phase=phase,
                overlaps=(group, phase) in self.overlapping,
                count=count,
                bytes=self.bytes[kind, group, phase],
            )
            for (kind, group, phase), count in self.counts.items()
        ]
        return tuple(sorted(found, key=lambda message: (-message.bytes, message.group, message.kind, message.phase)))


def _group_of(args: Sequence[Any]) -> Any:
    for value in args:
        if isinstance(value, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(value)
            except (RuntimeError, ValueError):  # a reduce operation
                continue
    return None


def _group_names(context: ParallelContext) -> dict[Any, str]:
    """Names of this rank's groups by their own name and by their ranks; the first counts."""
    groups = context.pg_collection
    named = {
        "world": dist.group.WORLD,
        **{name: getattr(groups, name, None) for name in ("tp", "pp", "dp_cp", "dp", "cp", "mp", "embd")},
        "ulysses": context.context.ulysses,
        "ring": context.context.ring,
        "replica": context.replica,
    }
    names: dict[Any, str] = {}
    for name, group in named.items():
        if isinstance(group, dist.ProcessGroup):
            names.setdefault(group.group_name, name)
            names.setdefault(tuple(dist.get_process_group_ranks(group)), name)
    return names

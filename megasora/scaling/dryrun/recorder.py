"""Sees every operation of a dry run and tells those who count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megasora.models.mmdit.kernels.operators import BYTES_MOVED
from megasora.parallel.groups import ParallelContext
from megasora.perf.memory_traffic import MOVE_NOTHING, bytes_moved
from megasora.scaling.dryrun.messages import Messages
from megasora.scaling.dryrun.place import Phase, Place
from megasora.scaling.dryrun.products import PRODUCTS, Products
from megasora.scaling.dryrun.timeline import Timeline


class Recorder(TorchDispatchMode):
    """Records while it is entered, inside a fake tensor mode.

    Args:
        context: this rank's groups.
        overlapping: groups whose messages run beside computation in a phase.
    """

    def __init__(self, context: ParallelContext, *, overlapping: frozenset[tuple[str, Phase]]) -> None:
        super().__init__()
        self.place = Place()
        self.products = Products(self.place)
        self.messages = Messages(self.place, context=context, overlapping=overlapping)
        self.timeline = Timeline(self.place)
        self.operations: Counter[Phase] = Counter()
        self.bytes_moved: Counter[Phase] = Counter()
        """By what is no matrix product, no attention and no message."""
        self.on = False
        """Off while the model is built."""
        self.order: list[tuple[int, int]] = []
        """(micro-batch, chunk) of the forward passes."""
        self.num_chunks = 1
        self._passes: Counter[Phase] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` (or answer in its place) and count it."""
        if func.namespace == "c10d":
            return self.messages.see(func, args, counted=self.on)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _one(args[0].dtype)
        result = func(*args, **(kwargs or {}))
        if not self.on:
            return result
        self.timeline.see(result)
        name = func.overloadpacket.__name__
        self.operations[self.place.phase] += 1
        if name in MOVE_NOTHING or (name in PRODUCTS and self.products.see(args)) or self.place.in_attention:
            return result
        self.bytes_moved[self.place.phase] += bytes_moved(func, args, kwargs or {}, result, formulas=BYTES_MOVED)
        return result

    def passes(self, phase: Phase, real: Callable[..., Any]) -> Callable[..., Any]:
        """A schedule's forward or backward step that is an event of the timeline."""

        def step(*args: Any, **kwargs: Any) -> Any:
            microbatch, chunk = self.order[self._passes[phase]]
            self._passes[phase] += 1
            if phase == "backward":  # the chunks' passes in reverse
                chunk = self.num_chunks - 1 - chunk
            with self.timeline.event(phase, chunk=chunk, microbatch=microbatch):
                return real(*args, **kwargs)

        return step


def _one(dtype: torch.dtype) -> bool | int | float:
    """What a host reads from a fake tensor."""
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1

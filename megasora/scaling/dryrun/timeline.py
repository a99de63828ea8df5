"""Bytes allocated over the step, beside the rank's state: what a GPU's allocator would count, without its rounding.

A storage is counted from the operation that made it until nothing holds it; one that recomputation empties counts nothing until it is
filled again.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megasora.scaling.dryrun.place import PHASES, Event, Phase, Place


class Timeline:
    """Follows storages.

    Args:
        place: where the step is.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.live: Counter[str] = Counter()
        """Bytes now, by what they are."""
        self.total = 0
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        """`live` at the peak."""
        self.before_step_end: dict[str, int] = {}
        """`live` when the last backward pass was through."""
        self.peak_event: tuple[Phase, int, int] = ("step end", 0, 0)
        self.events: list[Event] = []
        self._event_peak = 0
        self._known: set[int] = set()
        self._storages: dict[int, tuple[Any, int, str]] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave the storages of these out: state and inputs, which are counted apart."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            self._known.add(key)
            self._forget(key)

    def see(self, result: Any) -> None:
        """Count what an operation made."""
        leaves = (result,) if isinstance(result, Tensor) else tree_leaves(result)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._storages and key not in self._known:
                    self._add(storage, key)

    def _add(self, storage: torch.UntypedStorage, key: int) -> None:
        size, tag = storage.nbytes(), self.place.tag or self.place.phase
        self._storages[key] = (weakref.ref(storage, lambda _: self._forget(key)), size, tag)
        self._change(tag, size)

    def _forget(self, key: int) -> None:
        entry = self._storages.pop(key, None)
        if entry is not None:
            self._change(entry[2], -entry[1])

    def _resized(self, storage: torch.UntypedStorage, size: int) -> None:
        entry = self._storages.get(storage._cdata)
        if entry is not None:
            filled = size and entry[2] in PHASES
            tag = self.place.phase if filled else entry[2]
            self._change(entry[2], -entry[1])
            self._storages[storage._cdata] = (entry[0], size, tag)
            self._change(tag, size)

    def _change(self, tag: str, size: int) -> None:
        self.live[tag] += size
        self.total += size
        if self.total > self._event_peak:
            self._event_peak = self.total
            if self.total > self.peak:
                self.peak, self.at_peak = self.total, dict(self.live)
                self.peak_event = (self.place.phase, self.place.chunk, self.place.microbatch)

    @contextmanager
    def event(self, phase: Phase, *, chunk: int = 0, microbatch: int = 0) -> Iterator[None]:
        """A pass: sets the place, and is an entry of the timeline."""
        place = self.place
        before, self._event_peak = self.total, self.total
        if phase == "step end":
            self.before_step_end = dict(self.live)
        outer = (place.chunk, place.microbatch)
        place.chunk, place.microbatch = chunk, microbatch
        with place.during(phase):
            yield
        place.chunk, place.microbatch = outer
        self.events.append(Event(phase=phase, chunk=chunk, microbatch=microbatch, before=before, peak=self._event_peak, after=self.total))

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """See storages being emptied and filled, which is no operation."""
        real = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = real(storage, size)
            self._resized(storage, size)
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", resize):
            yield

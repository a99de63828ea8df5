"""Names for collectives in traces of torch.profiler: of which axis, which operation, and what a rank waits for.

NCCL's kernels carry their group in a trace. Gloo's operations run in threads that carry none, and the wait of the rank is no event at all;
while `NamedCollectives` is installed, both are ranges `comm|AXIS|OPERATION` of the thread that calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch.distributed import ProcessGroup, Work
from torch.profiler import record_function

from megasora.perf.ranges import COMM, axis_of

METHODS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "all_gather_single": "all_gather",
    "_allgather_base": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
}
"""Methods of a process group (torch 2.11 to 2.13) and their operation."""


class NamedCollectives:
    """Ranges around the collectives of this process, and around waiting for them, from `install` to `remove`."""

    def __init__(self) -> None:
        self._originals: list[tuple[type, str, Any]] = []
        self._names: WeakKeyDictionary[Work, str] = WeakKeyDictionary()

    def install(self) -> None:
        """Put the ranges around every call from now on."""
        for method, operation in METHODS.items():
            if method in ProcessGroup.__dict__:
                self._replace(ProcessGroup, method, self._named(getattr(ProcessGroup, method), operation))
        self._replace(Work, "wait", self._waiting(Work.wait))

    def remove(self) -> None:
        """Take them away again."""
        for kind, method, original in self._originals:
            setattr(kind, method, original)
        self._originals.clear()
        self._names.clear()

    def _replace(self, kind: type, method: str, function: Callable[..., Any]) -> None:
        self._originals.append((kind, method, kind.__dict__[method]))  # the descriptor: getattr's function would not bind
        setattr(kind, method, function)

    def _named(self, original: Callable[..., Any], operation: str) -> Callable[..., Any]:
        def call(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            name = f"{COMM}{axis_of(group.group_desc)}|{operation}"
            with record_function(name):
                work = original(group, *args, **kwargs)
            if work is not None:
                self._names[work] = name
            return work

        return call

    def _waiting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wait(work: Work, *args: Any, **kwargs: Any) -> Any:
            with record_function(self._names.get(work, f"{COMM}world|unknown") + "|wait"):
                return original(work, *args, **kwargs)

        return wait

"""Ranks of one start find each other in a store that remembers the ranks of earlier starts."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from torch.distributed import HashStore

from megasora.parallel.meeting import call_together, follow_the_call


def soon(seconds: float) -> None:
    time.sleep(seconds / 50)


def meet(store: HashStore, *, world_size: int, late: int | None = None) -> list[str]:
    """One start; rank `late` comes last, when rank 0 has called with what its predecessor said."""
    called = threading.Event()

    def begin(rank: int) -> str:
        if rank == 0:
            return call_together(store, world_size=world_size, sleep=lambda seconds: (called.set(), soon(seconds)))
        if rank == late:
            called.wait(10)
        return follow_the_call(store, rank=rank, sleep=soon)

    with ThreadPoolExecutor(world_size) as ranks:
        return list(ranks.map(begin, range(world_size), timeout=30))


def test_each_start_has_one_name_of_its_own() -> None:
    store = HashStore()
    names = [meet(store, world_size=3) for _ in range(3)]
    assert all(len(set(of_start)) == 1 for of_start in names)
    assert len({of_start[0] for of_start in names}) == 3


def test_a_rank_that_is_gone_is_not_taken_for_its_successor() -> None:
    store = HashStore()
    before = meet(store, world_size=3)
    after = meet(store, world_size=3, late=2)
    assert len(set(after)) == 1
    assert after[0] != before[0]


def test_a_world_may_shrink_and_grow() -> None:
    store = HashStore()
    for world_size in (3, 1, 2, 4):
        assert len(set(meet(store, world_size=world_size))) == 1

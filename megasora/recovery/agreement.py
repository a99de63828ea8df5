"""How supervisors agree on a generation: a torch store that outlives the ranks they start.

Every supervisor tells how its rank's process ended; rank 0's, which hosts the store, decides once it knows all, and all read the decision.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

from megasora.recovery.restarts import Decision, Life

POLL_S = 0.2


class Store(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str, /) -> object: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...


class PeerLostError(RuntimeError):
    """A supervisor did not answer in time: its node is gone."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A supervisor among the others."""

    rank: int
    world_size: int
    master_addr: str = "localhost"
    master_port: int = 29500

    @property
    def store_port(self) -> int:
        """Of the supervisors' own store."""
        return self.master_port + 1

    def rank_port(self, generation: int) -> int:
        """MASTER_PORT of a generation's ranks: not the last one's, whose sockets may linger."""
        return self.master_port + 2 + generation % 50


def open_store(place: Place, *, timeout_s: float) -> Store:
    """The store of a place, hosted by rank 0.

    Raises:
        RuntimeError: it cannot be reached in time.
    """
    from datetime import timedelta

    from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

    if place.world_size == 1:
        return HashStore()
    return TCPStore(
        place.master_addr, place.store_port, place.world_size, place.rank == 0, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )


class Agreement:
    """A supervisor's side.

    Args:
        store: shared by all.
        place: this supervisor's.
        timeout_s: how long the others may take to tell and to decide.
        sleep: waits.
    """

    def __init__(self, store: Store, place: Place, *, timeout_s: float, sleep: Callable[[float], object] = time.sleep) -> None:
        self._store, self._place, self._timeout_s, self._sleep = store, place, timeout_s, sleep

    def tell_failure(self, generation: int) -> None:
        """This supervisor's rank died: the others need not wait for theirs."""
        self._store.add(f"failed/{generation}", 1)

    def failed(self, generation: int) -> bool:
        """Whether any rank died."""
        return self._store.check([f"failed/{generation}"])

    def tell_success(self, generation: int) -> None:
        """This supervisor's rank ended well."""
        self._store.add(f"done/{generation}", 1)

    def all_succeeded(self, generation: int) -> bool:
        """Whether all ranks ended well."""
        return self._store.add(f"done/{generation}", 0) == self._place.world_size

    def tell_end(self, generation: int, life: Life) -> None:
        """How this supervisor's rank ended."""
        self._store.set(f"end/{generation}/{life.rank}", json.dumps(asdict(life)))

    def ends(self, generation: int) -> list[Life]:
        """How all ranks ended.

        Raises:
            PeerLostError: a supervisor does not tell.
        """
        keys = [f"end/{generation}/{rank}" for rank in range(self._place.world_size)]
        self._await(keys, "did not say how its rank ended")
        return [Life(**json.loads(self._store.get(key))) for key in keys]

    def tell_decision(self, generation: int, decision: Decision) -> None:
        """Rank 0's supervisor has decided."""
        self._store.set(f"decision/{generation}", json.dumps(asdict(decision)))

    def decision(self, generation: int) -> Decision:
        """What rank 0's supervisor decided.

        Raises:
            PeerLostError: it does not tell.
        """
        self._await([f"decision/{generation}"], "did not decide")
        return Decision(**json.loads(self._store.get(f"decision/{generation}")))

    def ask_to_stop(self) -> None:
        """This supervisor was asked to stop: no generation may follow."""
        self._store.add("stop", 1)

    def asked_to_stop(self) -> bool:
        """Whether any supervisor was."""
        return self._store.check(["stop"])

    def leave(self, *, within_s: float = 10.0) -> None:
        """Rank 0's supervisor, which hosts the store, goes last."""
        self._store.add("left", 1)
        deadline = time.monotonic() + within_s
        while self._place.rank == 0 and self._store.add("left", 0) < self._place.world_size and time.monotonic() < deadline:
            self._sleep(POLL_S)

    def _await(self, keys: list[str], what: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        waiting = list(keys)
        while waiting := [key for key in waiting if not self._store.check([key])]:
            if time.monotonic() > deadline:
                who = f"rank {waiting[0].rsplit('/', 1)[1]}" if waiting[0].startswith("end/") else "rank 0"
                raise PeerLostError(f"the supervisor of {who} {what} within {self._timeout_s:.0f} s; its node may be gone")
            self._sleep(POLL_S)

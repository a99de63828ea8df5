"""Where ranks meet that torchrun has started again: each start under a prefix of its own in the store that torchrun keeps.

That store outlives the ranks and holds the addresses of those that died, and torch 2.13 reads them again: in every restart gloo and NCCL
connect to sockets that are gone. torch has no setting for it that holds everywhere: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 does nothing
with the fixed port of one node (torch/distributed/elastic/rendezvous/static_tcp_rendezvous.py, use_agent_store), and the number of
restarts is each node's own count. So the ranks agree: rank 0 calls a new name together with what it has heard from each rank, and only a
rank that finds its own words in the call answers.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

_POLL_S = 0.1


class Store(Protocol):
    """What is used of torch.distributed.Store; `get` waits for its key."""

    def set(self, key: str, value: str, /) -> object: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


def store_of_this_start(*, rank: int, world_size: int, timeout: timedelta) -> Any:
    """A store for init_process_group that holds nothing of ranks that are gone; None where torch makes a new one by itself.

    Args:
        rank: of this process.
        world_size: ranks of the start, all of which call it.
        timeout: how long the others may take to come.

    Raises:
        torch.distributed.DistStoreError: a rank did not come in time.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=timeout)
    meeting = PrefixStore("meeting", store)
    name = call_together(meeting, world_size=world_size) if rank == 0 else follow_the_call(meeting, rank=rank)
    return PrefixStore(f"start_{name}", store)


def call_together(store: Store, *, world_size: int, sleep: Callable[[float], object] = time.sleep) -> str:
    """Rank 0's side: the name of this start, once every other rank knows it."""
    name, heard = uuid.uuid4().hex, {}
    missing = list(range(1, world_size))
    while missing:
        for rank in missing:  # of a rank that is gone at first, until its successor has come
            heard[str(rank)] = store.get(f"here/{rank}").decode()
        store.set("call", json.dumps({"name": name, "heard": heard}))
        sleep(_POLL_S)
        missing = [rank for rank in missing if not store.check([f"came/{name}/{rank}"])]
    return name


def follow_the_call(store: Store, *, rank: int, sleep: Callable[[float], object] = time.sleep) -> str:
    """Another rank's side: the name of this start."""
    words = uuid.uuid4().hex
    store.set(f"here/{rank}", words)
    while True:
        call = json.loads(store.get("call"))
        if call["heard"].get(str(rank)) == words:
            store.set(f"came/{call['name']}/{rank}", "")
            return str(call["name"])
        sleep(_POLL_S)

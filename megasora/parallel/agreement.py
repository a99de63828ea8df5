"""What all ranks of the world must know or do alike, although one finds it, or each finds something else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch.distributed as dist

from megasora.config.errors import UserError

T = TypeVar("T")


def told_by_rank_0(decide: Callable[[], T]) -> T:
    """What `decide` returns on rank 0, on every rank. All ranks call it together.

    Raises:
        UserError: rank 0 was refused; the same on every rank, so that none waits for one that has ended.
    """
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [(decide(), None)]
        except UserError as error:
            told = [(None, str(error))]
    dist.broadcast_object_list(told, src=0)
    value, refusal = told[0]
    if refusal is not None:
        raise UserError(refusal)
    result: T = value
    return result


def on_rank_0(act: Callable[[], T]) -> T | None:
    """What rank 0 gets by `act`, which is not sent; None on the others. All ranks call it together.

    Raises:
        UserError: see `told_by_rank_0`.
    """
    got: list[T] = []
    told_by_rank_0(lambda: got.append(act()))
    return got[0] if got else None


def had_by_all(own: Iterable[int]) -> list[int]:
    """Numbers that every rank has, ascending. All ranks call it together."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, sorted(own))
    return sorted(set.intersection(*map(set, of_ranks)))

"""Inputs of recomputed blocks that wait in host memory: a step is the same to the bit, in every kind of layout."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from megasora.config.schema import ParallelConfig
from megasora.models.mmdit import offload
from tests.parallel.layouts import Case, Measured, assemble, one_step
from tests.parallel.sharded_steps import sharded_step
from tests.parallel.test_parity import layout
from tests.pool import RankPool


def counted_step(rank: int, case: Case) -> tuple[Measured, int]:
    """A step, and how many tensors went to the host."""
    real, made = offload.host_memory, []

    def host_memory(like: Tensor) -> Tensor:
        made.append(like.shape)
        return real(like)

    with mock.patch.object(offload, "host_memory", host_memory):
        measured = (one_step if case.parallel.zero_stage == 1 else sharded_step)(rank, case)
    return measured, len(made)


MANY = 4
"""Micro-batches of a step."""
LAYOUTS = {
    "one rank": (1, layout(recompute="full"), [MANY * (3 * 2 + 4)]),
    "one rank, counts": (1, layout(recompute="selective", recompute_double_blocks=2, recompute_single_blocks=0), [MANY * 2]),
    "tp2 cp2, counts": (4, layout(tp=2, cp=2, recompute="count", recompute_double_blocks=1, recompute_single_blocks=2), [MANY * 3] * 4),
    # stages of 4 and 4 blocks: three double ones and a single one, of which the last stays; four single ones
    "pp2": (2, layout(pp=2, recompute="full", pipeline_split="given", pipeline_blocks=(4, 4)), [MANY * 6, MANY * 3]),
    # chunks of two: the first holds two double blocks, the second a double one, whose input is the message, and a single one
    "pp2 vp2": (
        2,
        layout(pp=2, vp=2, recompute="full", pipeline_split="given", pipeline_blocks=(2, 2, 2, 2)),
        [MANY * (2 + 1), MANY * (0 + 1)],
    ),
    "zero 3, cp2": (2, layout(cp=2, recompute="full", zero_stage=3), [MANY * (3 * 2 + 4)] * 2),
}
"""Ranks, layout, tensors that go to the host on each rank."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_is_the_same_to_the_bit(pool: RankPool, name: str) -> None:
    world_size, parallel, expected = LAYOUTS[name]

    def step(of: ParallelConfig) -> tuple[dict[str, Tensor], Measured, list[int]]:
        results = pool.run(world_size, counted_step, Case(parallel=of, num_microbatches=MANY))
        return assemble([measured for measured, _ in results]), results[0][0], [count for _, count in results]

    plain, measured, none = step(parallel)
    gradients, again, counts = step(replace(parallel, offload="inputs"))
    assert none == [0] * world_size
    assert counts == expected
    assert (measured.loss, measured.grad_norm) == (again.loss, again.grad_norm)
    assert all(torch.equal(gradients[key], value) for key, value in plain.items())

"""What overlaps by itself, and what an explicit setting changes."""

from __future__ import annotations

import pytest

from megasora.config.schema import ParallelConfig
from megasora.training.optimizer import Overlap, overlap_of


@pytest.mark.parametrize(
    ("reduce", "gather", "on_cuda", "replicas", "expected"),
    [
        (None, None, True, 2, (True, True)),
        (None, None, True, 1, (False, False)),  # nobody to talk to
        (None, None, False, 2, (False, False)),
        (False, None, True, 2, (False, False)),  # the gather needs the reduction
        (True, None, True, 2, (True, True)),
        (None, False, True, 2, (True, False)),
        (True, None, False, 2, (True, False)),
        (None, True, False, 2, (True, True)),
        (True, True, True, 1, (True, True)),
    ],
)
def test_messages_overlap_on_gpus_with_replicas_unless_a_setting_says_otherwise(
    reduce: bool | None, gather: bool | None, on_cuda: bool, replicas: int, expected: tuple[bool, bool]
) -> None:
    parallel = ParallelConfig(overlap_grad_reduce=reduce, overlap_param_gather=gather)
    assert overlap_of(parallel, on_cuda=on_cuda, replicas=replicas) == Overlap(grad_reduce=expected[0], param_gather=expected[1])

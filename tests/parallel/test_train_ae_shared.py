"""Ranks that share clips of an autoencoder in training: gradients, numbers, curves and restarts are those of one rank."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.parallel.shared_clips import Case, step_on_rank
from tests.pool import RankPool

CLIPS = ((8, 20, 16), (1, 20, 16), (12, 20, 8))
"""5 latent rows, 2 or 3 latent frames, and a picture."""
DC_AE = Case(kind="dc-ae", clips=CLIPS)
HUNYUAN = Case(kind="hunyuan", clips=((5, 24, 16), (1, 24, 16)))
"""3 latent rows, so slabs of 16 and 8 rows; the discriminator's patches are of 4: 12 and 12."""
CASES = {
    "3 have a clip each": (3, DC_AE),
    "2 share rows": (2, replace(DC_AE, context_parallel_size=2)),
    "3 share rows": (3, replace(DC_AE, context_parallel_size=3)),
    "2 share frames, the picture's rows": (2, replace(DC_AE, context_parallel_size=2, axis="time")),
    "3 share frames, of which one has none": (3, replace(DC_AE, context_parallel_size=3, axis="time", recompute=True)),
    "2 pairs share rows": (4, replace(DC_AE, context_parallel_size=2)),
    "2 share rows, no discriminator": (2, replace(DC_AE, context_parallel_size=2, adversarial=False)),
    "2 share rows, norm of groups": (2, replace(DC_AE, context_parallel_size=2, norm="group")),
    "hunyuan, 2 share rows": (2, replace(HUNYUAN, context_parallel_size=2)),
    "hunyuan, 3 share rows, recomputed": (3, replace(HUNYUAN, context_parallel_size=3, recompute=True)),
    "hunyuan, 4 share rows, of which one has none": (4, replace(HUNYUAN, context_parallel_size=4)),
}


@cache
def of_one(pool: RankPool, case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """The step on one rank, whatever shares the case's."""
    (found,) = pool.run(1, step_on_rank, replace(case, context_parallel_size=1, axis="height", recompute=False))
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_a_step_has_the_gradients_of_one_rank(pool: RankPool, name: str) -> None:
    ranks, case = CASES[name]
    expected, numbers = of_one(pool, replace(case, context_parallel_size=1, axis="height", recompute=False))
    found, ours = pool.run(ranks, step_on_rank, case)[ranks - 1]
    largest = max(float(gradient.norm()) for gradient in expected.values())
    assert (float(expected["discriminator.out.weight"].norm()) > 0) == case.adversarial
    for key, gradient in expected.items():
        # a key's bias shifts all scores alike: its gradient is zero but for rounding
        assert float((found[key] - gradient).norm()) <= 1e-10 * max(float(gradient.norm()), 1e-6 * largest), key
    torch.testing.assert_close(ours, numbers, rtol=1e-10, atol=1e-12)

"""A step is skipped where the velocity changes little, and what is skipped is extrapolated."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megasora.diffusion.guidance import Branch
from megasora.diffusion.reuse import FIRST_STEPS, StepReuse

BRANCHES = [Branch(text=True, given=False), Branch(text=False, given=False)]


def linear(x: Tensor, t: float, branches: list[Branch]) -> list[Tensor]:
    """Velocities that are linear in t: extrapolation is exact."""
    return [torch.full_like(x, 2.0 + t + branch.text) for branch in branches]


def walk(reuse: StepReuse, steps: int) -> list[list[Tensor]]:
    return [reuse(torch.zeros(3, 2, dtype=torch.float64), 1 - step / steps, BRANCHES) for step in range(steps)]


def test_what_is_linear_is_extrapolated_exactly_and_asked_for_seldom() -> None:
    reuse = StepReuse(linear, threshold=0.05, sum_over_ranks=lambda values: values)  # type: ignore[arg-type]
    for step, (with_text, without) in enumerate(walk(reuse, 40)):
        assert with_text[0, 0].item() == pytest.approx(3 + 1 - step / 40, rel=1e-12)
        assert without[0, 0].item() == pytest.approx(2 + 1 - step / 40, rel=1e-12)
    # the change per time is near 1 / 3.5, so 0.05 is passed after 0.175 of the time: 7 steps of 40
    assert reuse.asked == 40
    assert FIRST_STEPS + 3 <= reuse.evaluated <= FIRST_STEPS + 7


def test_a_velocity_that_turns_is_evaluated_at_every_step() -> None:
    def turning(x: Tensor, t: float, branches: list[Branch]) -> list[Tensor]:
        return [torch.full_like(x, math.cos(40 * t)) for _ in branches]

    reuse = StepReuse(turning, threshold=0.05, sum_over_ranks=lambda values: values)  # type: ignore[arg-type]
    walk(reuse, 40)
    assert reuse.evaluated == 40


def test_the_estimate_is_of_all_ranks() -> None:
    # this rank's velocity rests, the other's changes: squares of the other are added to (0, size)
    def resting(x: Tensor, t: float, branches: list[Branch]) -> list[Tensor]:
        return [torch.ones_like(x) for _ in branches]

    alone = StepReuse(resting, threshold=0.05, sum_over_ranks=lambda values: values)  # type: ignore[arg-type]
    walk(alone, 20)
    assert alone.evaluated == FIRST_STEPS
    other = torch.tensor([4.0, 12.0], dtype=torch.float64)
    beside = StepReuse(resting, threshold=0.05, sum_over_ranks=lambda values: values + other)  # type: ignore[arg-type]
    walk(beside, 20)
    assert beside.evaluated == 20

"""The schedule of the learning rate, step by step."""

from __future__ import annotations

from megasora.config.schema import OptimizerConfig
from megasora.training.optimizer import learning_rate


def rates(config: OptimizerConfig, *, steps: int) -> list[float]:
    return [learning_rate(step, config=config) for step in range(steps)]


def test_warm_up_reaches_the_rate_in_its_last_step() -> None:
    assert rates(OptimizerConfig(lr=8.0, warmup_steps=4), steps=6) == [2, 4, 6, 8, 8, 8]
    assert rates(OptimizerConfig(lr=8.0), steps=2) == [8, 8]


def test_a_milestone_counts_from_its_own_step_on() -> None:
    assert rates(OptimizerConfig(lr=8.0, lr_milestones=((2, 4.0), (4, 1.0))), steps=6) == [8, 8, 4, 4, 1, 1]

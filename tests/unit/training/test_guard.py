"""What the guard calls bad, and what it asks for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megasora.config.schema import GuardConfig
from megasora.data.plan import SamplerState
from megasora.training.guard import Guard, LeftOut, append_left_out, read_left_out


def entry(consumed: int, *, step: int = 7) -> LeftOut:
    return LeftOut(position=SamplerState(epoch=1, consumed=consumed), step=step, reason="loss is nan")


def knowing(losses: list[float], norms: list[float] | None = None, **settings: object) -> Guard:
    guard = Guard(GuardConfig(window=2 * len(losses), **settings))  # type: ignore[arg-type]
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        guard.good(loss, norm)
    return guard


def test_what_is_not_finite_is_bad_from_the_first_step_on() -> None:
    guard = Guard(GuardConfig())
    assert guard.problem_with_loss(math.nan) == "loss is nan"
    assert guard.problem_with_norm(math.inf) == "gradient norm is inf"
    assert guard.problem_with_loss(1e30) is None  # nothing to compare with yet


def test_a_loss_is_compared_with_the_deviation_of_the_steps_before() -> None:
    guard = knowing([1.0, 2.0, 3.0], loss_deviations=4.0)  # mean 2, deviation 1
    assert guard.problem_with_loss(6.0) is None
    assert guard.problem_with_loss(7.0) == "loss 7 is 5 deviations above 2"
    assert knowing([1.0, 2.0, 3.0], loss_deviations=0.0).problem_with_loss(1e9) is None


def test_a_norm_is_compared_with_their_median() -> None:
    guard = knowing([1.0, 1.0, 1.0], [0.1, 0.2, 5.0], norm_factor=10.0)
    assert guard.problem_with_norm(2.0) is None
    assert guard.problem_with_norm(2.2) == "gradient norm 2.2 is 11 times 0.2"


def test_the_first_bad_step_is_left_out_and_the_next_one_goes_back() -> None:
    guard = Guard(GuardConfig(patience=2))
    assert [guard.bad(5), guard.bad(5)] == ["leave_out", "go_back"]
    guard.good(1.0, 1.0)
    assert guard.bad(6) == "leave_out"


def test_more_than_the_budget_within_a_window_ends_the_run() -> None:
    guard = Guard(GuardConfig(patience=9, budget=3, window=10))
    assert [guard.bad(step) for step in (1, 5, 9)] == ["leave_out"] * 3
    assert guard.bad(10) == "stop"
    assert guard.bad(11) == "leave_out"  # step 1 is a window ago
    assert Guard(GuardConfig(budget=0)).bad(1) == "stop"
    assert Guard(GuardConfig(on_bad_step="stop")).bad(1) == "stop"


def test_a_checkpoint_keeps_all_it_knows() -> None:
    guard = knowing([1.0, 2.0, 3.0], [0.1, 0.2, 0.3], loss_deviations=4.0)
    guard.leave_out([entry(3)])
    other = Guard(guard.settings)
    other.leave_out([entry(3, step=8), entry(9)])
    other.restore(json.loads(json.dumps(guard.state())))
    assert other.problem_with_loss(7.0) == guard.problem_with_loss(7.0)
    assert other.problem_with_norm(70.0) == guard.problem_with_norm(70.0)
    assert list(other.left_out) == [entry(3).position, entry(9).position]


def test_a_line_that_a_crash_cut_off_loses_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "recovery" / "left_out.jsonl"
    assert read_left_out(path) == []
    append_left_out(path, [entry(3), entry(4)])
    path.write_text(path.read_text() + '{"position": {"epo')
    assert read_left_out(path) == [entry(3), entry(4)]


@pytest.mark.parametrize("known", [3, 4])
def test_half_a_window_must_be_known(known: int) -> None:
    guard = Guard(GuardConfig(window=8))
    for _ in range(known):
        guard.good(1.0, 1.0)
    assert (guard.problem_with_norm(1e9) is None) == (known < 4)

"""Which steps are traced."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megasora import recipes
from megasora.config.profile_steps import profiled_steps
from megasora.config.schema import ProfileConfig
from megasora.config.validate import problems


def test_first_and_last_step_are_both_traced() -> None:
    assert list(profiled_steps("10:12")) == [10, 11, 12]
    assert list(profiled_steps("3")) == [3]
    assert list(profiled_steps(None)) == []


@pytest.mark.parametrize("text", ["12:10", "0:3", "a", "1:", "1:2:3", ""])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not FIRST:LAST"):
        profiled_steps(text)


@pytest.mark.parametrize("text", ["19:21", "x", "1:60"])
def test_validate_refuses_steps_that_a_run_does_not_make(text: str) -> None:
    config = replace(recipes.get("tiny"), profile=ProfileConfig(steps=text))  # 20 steps
    (problem,) = problems(config, world_size=1)
    assert problem.field == "profile.steps"
    assert "within 1:20" in str(problem)

"""Which steps a run traces: FIRST:LAST, counted from 1."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megasora.config.problem import Problem
from megasora.config.schema import RunConfig

MOST = 50
"""Steps of a trace: each step of a large model writes some tens of megabytes a rank, and all are held in memory until the last."""


def profiled_steps(text: str | None) -> range:
    """The steps of FIRST:LAST, or of one number; empty for None.

    Raises:
        ValueError: it is neither.
    """
    if text is None:
        return range(0)
    match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise ValueError(f"{text!r} is not FIRST:LAST with 1 <= FIRST <= LAST")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def check_profile(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Steps that the run makes, and not too many."""
    cure = f"use first:last step, such as 10:12, within 1:{config.train.steps} and at most {MOST} of them"
    try:
        steps = profiled_steps(config.profile.steps)
    except ValueError as error:
        yield Problem(field="profile.steps", message=str(error), cure=cure)
        return
    if steps and (steps[-1] > config.train.steps or len(steps) > MOST):
        yield Problem(field="profile.steps", message=f"{config.profile.steps} of a run of {config.train.steps} steps", cure=cure)

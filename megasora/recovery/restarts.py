"""Whether a run is started again: pure, from how its ranks ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

USER_MISTAKE = 2
"""Exit code of a UserError: another start would end the same way."""


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """How often, and how soon."""

    max_restarts: int = 20
    """Restarts without a new step in between."""
    backoff_s: float = 5.0
    """Wait before the first restart; it doubles until a step is made."""
    max_backoff_s: float = 300.0


class RestartBudget:
    """Counts restarts; a death further on than any before it refills the budget."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._furthest = 0
        self._used = 0

    def after_death(self, step: int) -> float | None:
        """Seconds to wait before the next start; None when the budget is used up.

        Args:
            step: the furthest that any rank has come.
        """
        if step > self._furthest:
            self._furthest, self._used = step, 0
        self._used += 1
        if self._used > self._policy.max_restarts:
            return None
        return min(self._policy.backoff_s * 2 ** (self._used - 1), self._policy.max_backoff_s)


@dataclass(frozen=True, kw_only=True)
class Life:
    """How a rank's process ended in one generation."""

    rank: int
    code: int
    """Exit code; -9 for SIGKILL and so on."""
    by_supervisor: bool
    """Ended by its supervisor, because another rank had died."""
    stopping: bool
    """Its supervisor was asked to stop."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What all supervisors do next."""

    restart: bool
    reason: str
    code: int = 0
    """Exit code of the supervisors when they end."""
    wait_s: float = 0.0
    """Before the next start."""


def decide(lives: Sequence[Life], *, budget: RestartBudget, step: int) -> Decision:
    """What follows from how a generation ended.

    Args:
        lives: of all ranks.
        budget: of the run.
        step: the furthest that any rank has come.
    """
    own = sorted((life for life in lives if life.code != 0 and not life.by_supervisor), key=lambda life: life.code)  # signals first
    worst = own[0] if own else next((life for life in lives if life.code != 0), None)
    code = 0 if worst is None else worst.code if worst.code > 0 else 128 - worst.code
    if any(life.stopping for life in lives):
        return Decision(restart=False, reason="asked to stop", code=code)
    if worst is None:
        return Decision(restart=False, reason="finished")
    if any(life.code == USER_MISTAKE for life in own):
        return Decision(restart=False, reason="a mistake in settings, files or set-up: a restart would not mend it", code=USER_MISTAKE)
    died = f"rank {worst.rank} ended with {f'signal {-worst.code}' if worst.code < 0 else f'exit code {worst.code}'}"
    wait_s = budget.after_death(step)
    if wait_s is None:
        return Decision(restart=False, reason=f"{died}; no restart is left without a new step", code=code)
    return Decision(restart=True, reason=died, wait_s=wait_s)

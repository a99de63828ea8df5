"""Steps that must not happen: a loss or gradient that is not finite or far off, seen before the weights change.

The first bad step is left out: its samples are passed over and the weights stay. When the next one is bad too the weights themselves are
suspect: the run goes back to its newest checkpoint and passes over those samples and the last ones that changed the weights. Passed-over
samples are remembered by the sampler's position, so a run that was told of them from the start is the same run to the bit. All numbers that
decide are sums over all ranks, so all decide alike, in any layout up to rounding.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megasora.config.files import json_lines
from megasora.config.schema import GuardConfig
from megasora.data.plan import SamplerState

Answer = Literal["leave_out", "go_back", "stop"]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A step's samples that the run passes over."""

    position: SamplerState
    """Where the sampler stood before them."""
    step: int
    """The step that they would have made, 1-based."""
    reason: str

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> LeftOut:
        """From JSON.

        Raises:
            KeyError, TypeError: it is none.
        """
        return cls(position=SamplerState(**record["position"]), step=record["step"], reason=record["reason"])


class Guard:
    """Judges losses and gradient norms by those of the steps before.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: GuardConfig) -> None:
        self.settings = settings
        self._good: deque[tuple[float, float]] = deque(maxlen=settings.window)
        self._bad_in_a_row = 0
        self._left_out_at: deque[int] = deque(maxlen=max(settings.budget, 1))
        self.left_out: dict[SamplerState, LeftOut] = {}
        """By position, oldest first."""

    def problem_with_loss(self, loss: float) -> str | None:
        """Why a step with this loss must not happen; None where it may."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not self._knows_enough or self.settings.loss_deviations == 0:
            return None
        losses = [loss for loss, _ in self._good]
        mean, deviation = statistics.fmean(losses), statistics.stdev(losses)
        if loss <= mean + self.settings.loss_deviations * deviation:
            return None
        return f"loss {loss:.4g} is {(loss - mean) / deviation if deviation else math.inf:.0f} deviations above {mean:.4g}"

    def problem_with_norm(self, norm: float) -> str | None:
        """The same of its gradient's norm, before clipping."""
        if not math.isfinite(norm):
            return f"gradient norm is {norm}"
        if not self._knows_enough or self.settings.norm_factor == 0:
            return None
        median = statistics.median(norm for _, norm in self._good)
        return None if norm <= self.settings.norm_factor * median else f"gradient norm {norm:.4g} is {norm / median:.0f} times {median:.4g}"

    def good(self, loss: float, norm: float) -> None:
        """A step has happened."""
        self._good.append((loss, norm))
        self._bad_in_a_row = 0

    def bad(self, step: int) -> Answer:
        """A step must not happen: what to do about it.

        Args:
            step: that it would have been, 1-based.
        """
        settings = self.settings
        if settings.on_bad_step == "stop":
            return "stop"
        full = len(self._left_out_at) == self._left_out_at.maxlen
        if settings.budget == 0 or (full and step - self._left_out_at[0] < settings.window):
            return "stop"
        self._left_out_at.append(step)
        self._bad_in_a_row += 1
        return "leave_out" if self._bad_in_a_row < settings.patience else "go_back"

    def leave_out(self, entries: Iterable[LeftOut]) -> None:
        """Pass over these from now on."""
        for entry in entries:
            self.left_out.setdefault(entry.position, entry)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"good": [list(pair) for pair in self._good], "left_out": [entry.record() for entry in self.left_out.values()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept; what was left out since stays so, and still counts against the budget."""
        self._good = deque(((loss, norm) for loss, norm in state["good"]), maxlen=self.settings.window)
        self._bad_in_a_row = 0
        self.leave_out(LeftOut.of(record) for record in state["left_out"])

    @property
    def _knows_enough(self) -> bool:
        return len(self._good) >= self.settings.window // 2


def read_left_out(path: Path) -> list[LeftOut]:
    """What a run has passed over so far; lines that a crash cut off are passed over too."""
    found = []
    for record in json_lines(path):
        try:
            found.append(LeftOut.of(record))
        except (KeyError, TypeError):
            continue
    return found


def append_left_out(path: Path, entries: Iterable[LeftOut]) -> None:
    """Remember more of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for entry in entries:
            file.write(json.dumps(entry.record()) + "\n")

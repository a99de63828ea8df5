"""Where each rank is in its steps: told to its heartbeat, and timed to find who holds the others up."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasora.config.run_basics import RunBasics
from megasora.parallel.groups import ParallelContext
from megasora.recovery.evidence import next_incarnation
from megasora.recovery.folder import RecoveryFolder
from megasora.recovery.heartbeat import Phase
from megasora.recovery.sentry import Sentry
from megasora.recovery.stragglers import PARTS, Part, StepTimer, find_stragglers
from megasora.recovery.watchdog import HangLimits
from megasora.training.profiling import Place, StepProfiler

_PHASE: dict[Place, Phase] = {
    "data": "data",
    "forward_backward": "forward_backward",
    "agree": "forward_backward",
    "optimizer": "optimizer",
    "save": "save",
    "evaluate": "evaluate",
}
_PART: dict[Place, Part] = {"data": "data", "forward_backward": "compute", "agree": "collectives", "optimizer": "optimizer"}


def open_sentry(config: RunBasics, *, context: ParallelContext, run_dir: Path) -> Sentry:
    """This rank's sentry; rank 0 numbers the start. All ranks call it together, once the run's folder is there."""
    number: list[Any] = [next_incarnation(RecoveryFolder.of_run(run_dir)) if context.rank == 0 else None]
    dist.broadcast_object_list(number, src=0)
    limits = HangLimits.of(config.recovery, decode_timeout_s=config.data.decode_timeout_s)
    return Sentry(
        run_dir,
        rank=context.rank,
        world_size=context.world_size,
        incarnation=number[0],
        limits=limits if config.recovery.watchdog else None,
    )


class Vitals:
    """A rank's places in its steps.

    Args:
        sentry: of this rank.
        config: the run.
        context: this rank's groups; all ranks make theirs together.
        profile: traces some steps; None traces none.
    """

    def __init__(self, sentry: Sentry, *, config: RunBasics, context: ParallelContext, profile: StepProfiler | None = None) -> None:
        self.sentry, self.settings, self.context, self.profile = sentry, config.recovery, context, profile
        self._timer = StepTimer(record=_device_event if context.device.type == "cuda" else None)
        self._step = 0
        self._hosts: list[str] = [""] * context.world_size
        dist.all_gather_object(self._hosts, socket.gethostname())

    def enter(self, place: Place) -> None:
        """This rank is at another place of the running step."""
        self.sentry.beat(self._step, _PHASE[place])
        self._timer.enter(_PART.get(place))
        if self.profile is not None:
            self.profile.enter(place)

    def next_step(self, step: int) -> None:
        """This rank waits for the clips of a step, counted from 1."""
        self._step = step
        if self.profile is not None:
            self.profile.next_step(step)
        self.enter("data")

    def after_step(self, step: int) -> list[dict[str, Any]]:
        """The step and what is due after it are done; the report that is due, as events. All ranks call it together."""
        self._timer.step()
        traced = self._trace(step)
        every = self.settings.report_interval_steps
        if not every or step % every:
            return traced
        own = torch.tensor(self._timer.take(), dtype=torch.float64, device=self.context.device)
        times = own.new_empty(self.context.world_size * len(PARTS))
        dist.all_gather_into_tensor(times, own)
        goodput = self.sentry.goodput()
        if goodput is None:  # rank 0 reports
            return traced
        found = find_stragglers(times.view(-1, len(PARTS)).tolist(), self._hosts, factor=self.settings.straggler_factor)
        slow = [{"event": "straggler", **straggler.data(), "said": straggler.line()} for straggler in found]
        return [*traced, {"event": "goodput", **goodput.data()}, *slow]

    def _trace(self, step: int) -> list[dict[str, Any]]:
        if self.profile is None:
            return []
        if self.profile.ends_with(step):
            self.sentry.beat(step, "save")  # it may take as long
        return self.profile.after_step(step)

    def close(self) -> None:
        """The end of the run, however it came; what is being traced is written."""
        if self.profile is not None:
            self.profile.close()


def _device_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event

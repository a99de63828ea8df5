"""Traces of some of a run's steps: one file of torch.profiler a rank, in which steps, their places and collectives can be told apart.

Ranges in a trace: `step|12`, within it `place|data`, `place|forward_backward`, ..., and on a CPU `comm|tp|all_gather`
(`perf.named_collectives`); NCCL's kernels name their group themselves. `megasora study trace` reads them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, record_function

from megasora.config.files import written_whole
from megasora.config.profile_steps import profiled_steps
from megasora.config.run_basics import RunBasics
from megasora.parallel.groups import ParallelContext
from megasora.perf.named_collectives import NamedCollectives
from megasora.perf.ranges import PLACE, STEP

Place = Literal["data", "forward_backward", "agree", "optimizer", "save", "evaluate"]
"""Where a rank is in a step."""


def open_profile(config: RunBasics, *, context: ParallelContext, run_dir: Path) -> StepProfiler | None:
    """What traces the run's steps on this rank; None where none are to be traced."""
    steps = profiled_steps(config.profile.steps)
    if not steps:
        return None
    folder = Path(config.profile.folder) if config.profile.folder else run_dir / "profile"
    return StepProfiler(steps, folder=folder, context=context, shapes=config.profile.shapes)


class StepProfiler:
    """Traces steps of this rank.

    Args:
        steps: which, counted from 1.
        folder: where the file goes; made when it is written.
        context: this rank's groups.
        shapes: record the shapes of inputs.
    """

    def __init__(self, steps: range, *, folder: Path, context: ParallelContext, shapes: bool) -> None:
        self.steps, self.folder, self.context, self.shapes = steps, folder, context, shapes
        self._profile: Any = None
        self._names = NamedCollectives() if context.device.type == "cpu" else None
        self._step: record_function | None = None
        self._place: record_function | None = None

    @property
    def file(self) -> Path:
        """This rank's trace."""
        return self.folder / f"rank_{self.context.rank:05d}.json.gz"

    def next_step(self, step: int) -> None:
        """A step begins: its clips are waited for."""
        self._leave()
        if step not in self.steps:
            self.close()
            return
        if self._profile is None:
            self._start()
        self._step = record_function(f"{STEP}{step}")
        self._step.__enter__()

    def enter(self, place: Place) -> None:
        """The running step is at another place."""
        if self._step is None:
            return
        self._leave_place()
        self._place = record_function(f"{PLACE}{place}")
        self._place.__enter__()

    def ends_with(self, step: int) -> bool:
        """Whether the trace is written after this step, which can take a while."""
        return self._profile is not None and step == self.steps[-1]

    def after_step(self, step: int) -> list[dict[str, Any]]:
        """The step is done; what its record says of it."""
        if self._step is None:
            return []
        self._leave()
        said = self._write() if self.ends_with(step) else None
        event = {"event": "profile", "step": step, "folder": str(self.folder)}
        if said is None:
            return [event]
        if self.context.rank > 0:  # its records are not kept
            print(f"megasora: {said}", file=sys.stderr, flush=True)
        return [{**event, "said": said}]

    def close(self) -> None:
        """Write what was traced."""
        self._leave()
        if (said := self._write()) is not None:
            print(f"megasora: {said}", file=sys.stderr, flush=True)

    def _write(self) -> str | None:
        """What there is to say: a trace that cannot be written does not end a rank that others wait for."""
        if self._profile is None:
            return None
        profile, self._profile = self._profile, None
        if self._names is not None:
            self._names.remove()
        if self.context.device.type == "cuda":
            torch.cuda.synchronize()
        profile.stop()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(self.file) as temporary:
                profile.export_chrome_trace(str(temporary))
        except OSError as error:
            return f"rank {self.context.rank}'s trace {self.file} cannot be written ({error.strerror or error}); the run goes on"
        return None

    def _start(self) -> None:
        cuda = [ProfilerActivity.CUDA] if self.context.device.type == "cuda" else []
        self._profile = torch.profiler.profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=self.shapes)
        self._profile.start()
        at, sizes = self.context.at, self.context.topology
        about = {"rank": self.context.rank, "device": self.context.device.type, "at": asdict(at), "pp": sizes.pp, "world": sizes.world_size}
        self._profile.add_metadata_json("megasora", json.dumps(about))
        if self._names is not None:
            self._names.install()

    def _leave(self) -> None:
        self._leave_place()
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _leave_place(self) -> None:
        if self._place is not None:
            self._place.__exit__(None, None, None)
            self._place = None

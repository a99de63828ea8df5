"""Whether a step has room on a GPU: the fullest rank's peak, with what a dry run does not see, against the GPU's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megasora.config.memory import memory_estimate
from megasora.config.memory_cure import memory_cure
from megasora.config.schema import RunConfig
from megasora.perf.hardware import Hardware
from megasora.scaling.dryrun.result import DryRun


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes of the fullest of the ranks that were run."""

    gpu: str
    gpu_bytes: float
    rank: int
    peak: int
    """Counted."""
    workspace: float
    """Of kernels, as `config.memory` has it: fake tensors need none."""
    cure: str | None
    """What would make the run fit; None where it does."""

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.cure is None

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "fits": self.fits}


def room_of(runs: Sequence[DryRun], config: RunConfig, *, gpu: Hardware) -> Room:
    """The fullest rank's room on a GPU."""
    fullest = max(runs, key=lambda run: run.memory.total)
    workspace = memory_estimate(config, world_size=fullest.world_size).workspace
    peak = fullest.memory.total
    fits = peak + workspace <= gpu.memory_bytes
    return Room(
        gpu=gpu.name,
        gpu_bytes=gpu.memory_bytes,
        rank=fullest.rank,
        peak=peak,
        workspace=workspace,
        cure=None if fits else memory_cure(config, world_size=fullest.world_size, gpu_bytes=gpu.memory_bytes),
    )


def room_line(room: Room) -> str:
    """One line for people."""
    needed = f"rank {room.rank} needs {room.peak / 1e9:.1f} GB, and {room.workspace / 1e9:.1f} GB for kernels' workspace"
    has = f"{room.gpu} has {room.gpu_bytes / 1e9:.0f} GB"
    return f"{needed}; {has}: it fits" if room.fits else f"[bold red]{needed}; {has}: it does not fit[/]; {room.cure}"

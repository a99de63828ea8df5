"""Makes the clips of a VBench plan: what stands whole in the folder is skipped, a share of an array is done, who draws is passed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megasora.config.errors import UserError
from megasora.data.decoding.contract import DecodeError
from megasora.evaluation.files import ClipFacts, clip_facts
from megasora.evaluation.vbench.prompts import PlannedClip

Draw = Callable[[PlannedClip, Path], None]
"""Makes a clip and writes it under a path; on every rank of a job, of which one writes."""
OnClip = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Making:
    """What a task found and did."""

    planned: int
    """Clips of the whole plan."""
    share: int
    """Of this task."""
    kept: int
    """Of the share, that stood there whole."""
    made: int
    remade: tuple[str, ...]
    """Made because what stood there was broken."""


def make_clips(
    plan: Sequence[PlannedClip], folder: Path, *, draw: Draw, facts: ClipFacts, task: tuple[int, int], on_clip: OnClip | None = None
) -> Making:
    """Make what is missing of a task's share.

    What is missing is decided before the first clip is drawn, so that all ranks of a job, which draw together, agree.

    Args:
        plan: all clips.
        folder: where they go.
        draw: makes one clip.
        facts: frames and size that a whole clip has.
        task: (i, n); clip k is made by task k % n.
        on_clip: told (clips done, clips to make) before each clip and at the end.

    Raises:
        UserError: a whole clip of another size stands in the folder.
    """
    own = [clip for number, clip in enumerate(plan) if number % task[1] == task[0]]
    states = {clip.path: state_of(folder / clip.path, facts) for clip in own}
    todo = [clip for clip in own if states[clip.path] != "whole"]
    for done, clip in enumerate(todo):
        if on_clip is not None:
            on_clip(done, len(todo))
        (folder / clip.path).parent.mkdir(parents=True, exist_ok=True)
        draw(clip, folder / clip.path)
    if on_clip is not None:
        on_clip(len(todo), len(todo))
    broken = tuple(clip.path for clip in todo if states[clip.path] == "broken")
    return Making(planned=len(plan), share=len(own), kept=len(own) - len(todo), made=len(todo), remade=broken)


def state_of(path: Path, facts: ClipFacts) -> str:
    """whole, missing, or broken (cut short or not readable).

    Raises:
        UserError: a readable clip of another size or with more frames: it is from other settings.
    """
    if not path.exists():
        return "missing"
    try:
        found = clip_facts(path)
    except DecodeError:
        return "broken"
    if found == facts:
        return "whole"
    if (found.height, found.width) == (facts.height, facts.width) and found.num_frames < facts.num_frames:
        return "broken"
    raise UserError(f"{path} has {found}, these settings make {facts}; choose another --output, or remove it")

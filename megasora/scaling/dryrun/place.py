"""Where in the step an operation happens: which pass, of which micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "backward", "recompute", "step end"]
"""recompute: a forward pass once more, within a backward pass; step end: all that is outside the passes, which is after them but for the
zeroing of gradients."""
PHASES: tuple[Phase, ...] = ("forward", "backward", "recompute", "step end")


@dataclass(frozen=True, kw_only=True)
class Event:
    """A pass of one micro-batch through one chunk, or the end of the step; bytes are beside the state and the inputs."""

    phase: Phase
    chunk: int
    """Model chunk of the stage; 0 at the end of the step."""
    microbatch: int
    """Number within the chunk; 0 at the end of the step."""
    before: int
    """Bytes allocated when it begins."""
    peak: int
    """Most bytes while it runs."""
    after: int
    """Bytes when it is over."""


@dataclass
class Place:
    """The present moment of a dry run; whoever records reads it."""

    phase: Phase = "step end"
    tag: str | None = None
    """What is being allocated, where that says more than the phase."""
    chunk: int = 0
    microbatch: int = 0
    scheduled: bool = False
    """From the first pass to the last: messages between passes then belong to one, not to the end of the step."""
    in_attention: bool = False
    """Within attention, whose FLOPs are counted as a whole."""

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Another phase for a while."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def allocating(self, tag: str) -> Iterator[None]:
        """What is allocated now is this."""
        before, self.tag = self.tag, tag
        try:
            yield
        finally:
            self.tag = before

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Within attention."""
        before, self.in_attention = self.in_attention, True
        try:
            yield
        finally:
            self.in_attention = before

"""How the loop of a run ends, whatever fails at its end."""

from __future__ import annotations

import errno
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from megasora.training.trainer import Trainer


class Loop:
    """What `Trainer.run` knows of a run whose trace cannot be ended."""

    def __init__(self) -> None:
        self.abandoned = False
        self.trainee = SimpleNamespace(step=0)
        self.basics = SimpleNamespace(train=SimpleNamespace(steps=1))
        self.log = nullcontext()
        self.guard = SimpleNamespace(leave_out=list)
        self.vitals = SimpleNamespace(close=self._fail)
        self.checkpoints = SimpleNamespace(close=self._nothing, abandon=self._abandon)
        self.greet = self._feed_and_train = self._nothing

    def _known_left_out(self) -> list[Any]:
        return []

    def _nothing(self) -> None: ...

    def _fail(self) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def _abandon(self) -> None:
        self.abandoned = True


def test_a_trace_that_cannot_be_ended_leaves_no_save_under_way() -> None:
    loop = Loop()
    with pytest.raises(OSError, match="Input/output error"):
        Trainer.run(loop)  # type: ignore[arg-type]
    assert loop.abandoned

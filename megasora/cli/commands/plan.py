"""`megasora plan`."""

from __future__ import annotations

from dataclasses import dataclass

from megasora.cli.later import later


@dataclass(frozen=True, kw_only=True)
class Args:
    """(not in this version) The layout planner."""


defaults, run = later("plan", "the layout planner is")

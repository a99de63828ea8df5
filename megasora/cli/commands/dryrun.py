"""`megasora dryrun`."""

from __future__ import annotations

from dataclasses import dataclass

from megasora.cli.later import later


@dataclass(frozen=True, kw_only=True)
class Args:
    """(not in this version) The dry run."""


defaults, run = later("dryrun", "the dry run is")

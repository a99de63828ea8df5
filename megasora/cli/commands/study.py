"""`megasora study`."""

from __future__ import annotations

from dataclasses import dataclass

from megasora.cli.later import later


@dataclass(frozen=True, kw_only=True)
class Args:
    """(not in this version) Scaling studies."""


defaults, run = later("study", "scaling studies are")

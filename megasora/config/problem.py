"""What `config.validate` finds, and the shape of a check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megasora.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that cannot work."""

    field: str
    message: str
    cure: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}; {self.cure}"


Check = Callable[[RunConfig, int], Iterator[Problem]]

"""Commands of the contract that this version does not have yet: they refuse, they are not missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from megasora.config.errors import UserError


def later(name: str, what: str) -> tuple[Callable[[Sequence[str]], Mapping[str, Any]], Callable[[Any], None]]:
    """(`defaults`, `run`) of such a command."""

    def refuse(_: object) -> NoReturn:
        raise UserError(f"{name}: {what} not available in this version; see docs/architecture.md for what is")

    return refuse, refuse

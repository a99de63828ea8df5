"""Functions of the user's, named on the command line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from megasora.config.errors import UserError


def imported(name: str, *, flag: str) -> Callable[..., Any]:
    """The function `MODULE:FUNCTION`.

    Args:
        name: of it.
        flag: that named it, for messages.

    Raises:
        UserError: it cannot be imported, or is no function.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{flag} {name} cannot be imported ({error}); give MODULE:FUNCTION with the module on PYTHONPATH") from error
    if not callable(found):
        raise UserError(f"{flag} {name} is no function")
    function: Callable[..., Any] = found
    return function

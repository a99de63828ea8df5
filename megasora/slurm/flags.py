"""Settings as the flags that `megasora train` takes."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any


def changed_flags(base: Any, config: Any, *, without: frozenset[str] = frozenset(), prefix: str = "") -> Iterator[str]:
    """Words that turn the settings `base` into `config`, in schema order.

    Args:
        base: the recipe's settings.
        config: settings of the same kind.
        without: dotted names that are left out.
        prefix: section of these settings, with its dot.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name = prefix + field.name
        was, now = getattr(base, field.name), getattr(config, field.name)
        if was == now or name in without:
            continue
        if dataclasses.is_dataclass(now):
            yield from changed_flags(was, now, without=without, prefix=f"{name}.")
        elif hints[field.name] is bool:  # a switch: --train.deterministic, --train.no_deterministic
            yield f"--{prefix}{'' if now else 'no_'}{field.name}"
        else:
            yield f"--{name}"
            yield from _words(now)


def _words(value: Any) -> Iterator[str]:
    """A value's words; those of a table stand one after the other."""
    if isinstance(value, tuple):
        for item in value:
            yield from _words(item)
    else:
        yield str(value)

"""Which commands there are: every module of `cli/commands` is one, every package in it a group (`megasora data ...`).

A command's module has `Args`, a frozen dataclass whose docstring is the help, and `run(args)`, which returns an `Answer` or None. It may
have `defaults(words)`: values of Args' fields that depend on the words after the command, such as a recipe's settings; and `EXTRA`: the
extra of setup.py that brings what it imports. A command that takes settings of several kinds has `kind_of(words)`: the class of its
arguments, which is `Args` or one of its `OTHERS`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megasora.cli import commands
from megasora.cli.endings import Answer


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command."""

    name: str
    """All its words: 'data probe'."""
    kind: type
    """Dataclass of its arguments."""
    run: Callable[[Any], Answer | None]
    defaults: Callable[[Sequence[str]], Mapping[str, Any]] | None
    extra: str | None
    kind_of: Callable[[Sequence[str]], type] | None = None
    """Which class of arguments the words after the command ask for; None where there is one."""
    others: tuple[type, ...] = ()
    """Those beside `kind`."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Commands under one word."""

    about: str
    members: Mapping[str, Command | Group]


def find_commands() -> Group:
    """All commands, in the order of their names."""
    return _group(commands, ())


def _group(package: ModuleType, words: tuple[str, ...]) -> Group:
    members: dict[str, Command | Group] = {}
    for entry in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        name = entry.name.replace("_", "-")
        members[name] = _group(module, (*words, name)) if entry.ispkg else _command(module, (*words, name))
    return Group(about=(package.__doc__ or "").strip(), members=members)


def _command(module: ModuleType, words: tuple[str, ...]) -> Command:
    return Command(
        name=" ".join(words),
        kind=module.Args,
        run=module.run,
        defaults=getattr(module, "defaults", None),
        extra=getattr(module, "EXTRA", None),
        kind_of=getattr(module, "kind_of", None),
        others=getattr(module, "OTHERS", ()),
    )

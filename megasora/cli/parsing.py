"""Parsing that the commands share: tyro with its complaints made one line, recipes with overrides, positional paths."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from megasora import recipes
from megasora.config.errors import UserError
from megasora.config.io import load_yaml
from megasora.config.schema import RunConfig

ArgsT = TypeVar("ArgsT")


def leave(code: int) -> None:
    """End now: a failed rank must not wait in a destructor for ranks that go on."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def flags_of(kind: Any, prefix: str = "") -> list[str]:
    """Every flag of a (nested) dataclass, with underscores."""
    hints = typing.get_type_hints(kind)
    names: list[str] = []
    for field in fields(kind):
        hint = hints[field.name]
        names += flags_of(hint, f"{prefix}{field.name}.") if is_dataclass(hint) else [f"--{prefix}{field.name}"]
    return names


def parse(kind: Callable[..., ArgsT], arguments: list[str], *, default: ArgsT | None = None, prog: str) -> ArgsT:
    """tyro, with its complaints made one line.

    Raises:
        UserError: an unknown flag or a value of the wrong type.
    """
    text = io.StringIO()
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(text):
            return tyro.cli(kind, args=arguments, prog=prog, use_underscores=True, **extra)  # type: ignore[no-any-return,call-overload]
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_one_line(text.getvalue(), prog)) from None


def _one_line(complaint: str, prog: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─]+", " ", complaint)
    words = re.sub(r"\s+", " ", plain).strip()
    words = re.sub(r"^(Parsing error|Unrecognized options|Required options)\s*", "", words)
    words = re.split(r"\s*(?:For full helptext|Argument helptext)", words)[0]
    return f"{words} (megasora {prog.removeprefix('megasora ')} --help lists the flags)"


def run_config(arguments: list[str], *, command: str) -> RunConfig:
    """RECIPE [--section.field value ...] -> config.

    Raises:
        UserError: no such recipe or flag, or a value of the wrong type.
    """
    if arguments[:1] in (["--help"], ["-h"]):
        print(f"usage: megasora {command} RECIPE [--section.field value ...]; megasora {command} tiny --help lists every setting")
        print(f"recipes: {', '.join(recipes.RECIPES)}, or the config.yaml of a run")
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"{command} needs a recipe or a config.yaml: megasora {command} RECIPE; there are {', '.join(recipes.RECIPES)}")
    name, overrides = arguments[0], [underscored(argument) for argument in arguments[1:]]
    config = load_yaml(Path(name)) if name.endswith((".yaml", ".yml")) else recipes.get(name)
    known = flags_of(RunConfig)
    for argument in overrides:
        flag = argument.split("=")[0]
        if flag.startswith("--") and flag not in known and flag != "--help" and f"--{flag[2:].replace('.no_', '.')}" not in known:
            near = difflib.get_close_matches(flag, known, n=1)
            raise UserError(f"unknown flag {flag}{f'; did you mean {near[0]}?' if near else ''}")
    return parse(RunConfig, overrides, default=config, prog=f"megasora {command} {name}")


def underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def partition(arguments: list[str], own: set[str]) -> tuple[list[str], list[str]]:
    """(flags in `own` with their values, the rest)."""
    mine: list[str] = []
    rest: list[str] = []
    target = rest
    for argument in arguments:
        if argument.startswith("--"):
            target = mine if argument.split("=")[0] in own else rest
        target.append(argument)
    return mine, rest


def paths(arguments: list[str], count: int, *, usage: str, kind: Callable[..., Any]) -> list[Path]:
    """The leading arguments that name files; `--help` shows the flags.

    Raises:
        UserError: too few of them.
    """
    if arguments[:1] in (["--help"], ["-h"]):
        parse(kind, ["--help"], prog=usage)
    if len(arguments) < count or any(argument.startswith("-") for argument in arguments[:count]):
        raise UserError(f"usage: {usage} [flags]; --help lists the flags")
    return [Path(argument) for argument in arguments[:count]]


@contextlib.contextmanager
def file_errors(interrupted: str | None = None) -> Iterator[None]:
    """Make the operating system's refusals one line, and say what an interruption leaves.

    Raises:
        UserError: a file cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or 'a file'}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        if interrupted:
            print(f"megasora: {interrupted}", file=sys.stderr)
        raise

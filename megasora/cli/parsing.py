"""From words to a command and its arguments: tyro's subcommands, with its complaints made one line."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, make_dataclass
from typing import Annotated, Any, Union

import tyro

from megasora.cli.registry import Command, Group, find_commands
from megasora.config.errors import UserError

HELP = ("-h", "--help")


def parse(words: Sequence[str]) -> tuple[Command, Any]:
    """The command that the words name, and its arguments.

    Raises:
        UserError: no such command or flag, or a value of the wrong type; one line.
        SystemExit: help or a completion script was asked for, and printed.
    """
    root = find_commands()
    words = _asking_for_help(root, words)
    with _one_line():
        args: Any = tyro.cli(_subcommands(root, words), args=words, prog="megasora", use_underscores=True)
    while hasattr(args, "chosen_command"):
        args = args.chosen_command
    command = next(command for command in _flat(root) if type(args) in (command.kind, *command.others))
    return command, args


def parse_some(kind: type, words: Sequence[str]) -> Any:
    """The flags of a dataclass among words that also have others; for `defaults` that depend on a flag.

    Raises:
        UserError: a value of the wrong type.
    """
    args: Any
    with _one_line():
        args, _ = tyro.cli(
            kind, args=[word for word in words if word not in HELP], return_unknown_args=True, use_underscores=True, add_help=False
        )
    return args


def _asking_for_help(root: Group, words: Sequence[str]) -> list[str]:
    """The words; `megasora`, `megasora help` and `megasora data` list the commands there."""
    place: Command | Group | None = root
    for word in words:
        place = place.members.get(word) if isinstance(place, Group) else None
    if list(words) == ["help"]:
        return ["--help"]
    return [*words, "--help"] if isinstance(place, Group) else list(words)


def _flat(group: Group) -> Iterator[Command]:
    for member in group.members.values():
        if isinstance(member, Group):
            yield from _flat(member)
        else:
            yield member


def _subcommands(group: Group, words: Sequence[str]) -> Any:
    """tyro's type of a group. The command that the words name gets the defaults they ask for."""
    choices: list[Any] = []
    for name, member in group.members.items():
        rest = words[1:] if words and words[0] == name else None
        choices.append(_choice(name, member, rest))
    return Union[tuple(choices)]  # noqa: UP007 - built from a list


def _choice(name: str, member: Command | Group, rest: Sequence[str] | None) -> Any:
    if isinstance(member, Group):
        inner: Any = Annotated[_subcommands(member, rest or ()), tyro.conf.arg(name="")]  # type: ignore[valid-type]
        kind = make_dataclass(name, [("chosen_command", inner)], frozen=True, kw_only=True)
        kind.__doc__ = member.about
        return Annotated[kind, tyro.conf.subcommand(name)]
    if rest is None or member.defaults is None:
        return Annotated[member.kind, tyro.conf.subcommand(name)]
    wanted = member.kind if member.kind_of is None else member.kind_of(rest)
    return Annotated[wanted, tyro.conf.subcommand(name, default=_with_defaults(wanted, member.defaults(rest)))]


def _with_defaults(kind: type, given: Mapping[str, Any]) -> Any:
    required = [field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING]
    return kind(**{**dict.fromkeys(required, tyro.MISSING_NONPROP), **given})


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text):
            yield
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(one_line(text.getvalue())) from None


def one_line(complaint: str) -> str:
    """A complaint of tyro's, which is a framed text of many lines, as one line with the nearest name or the command that helps."""
    plain = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─]+", " ", complaint)
    words = re.sub(r"\s+", " ", plain).strip()
    helps = re.search(r"applied to (megasora(?: [\w-]+)*)\)", words) or re.search(r"(?:run|see):? (megasora(?: [\w-]+)*) --help", words)
    command = helps.group(1) if helps else "megasora"
    cure = f"({command} --help lists what there is)"
    unknown = re.search(r"Unrecognized (?:or misplaced )?options: (\S+)", words)
    missing = re.search(r"Missing from (megasora(?: [\w-]+)*): (.*\(required\))", words)
    absent = re.search(r"Missing value for argument 'chosen_command\.([\w.]+)'", words)
    if unknown:
        name = unknown.group(1).rstrip(",").split("=")[0]
        is_command = "Available subcommands" in words and not name.startswith("-")
        what = "command" if is_command else "flag" if name.startswith("-") else "argument"
        near = _nearest(name, words, command)
        return f"no {what} {name}{f'; did you mean {near}?' if near else f' {cure}'}"
    if missing:
        names = [entry.split()[0] for entry in missing.group(2).split("(required)") if entry.strip()]
        return f"{missing.group(1).removeprefix('megasora ')} needs {', '.join(names)} {cure}"
    if absent:
        return f"{command.removeprefix('megasora ')} needs {absent.group(1).upper()} {cure}"
    what = re.split(r"\s*(?:For full helptext|Argument helptext)", words)[0]
    return f"{re.sub(_TITLE, '', what)} {cure}"


_TITLE = r"^(Parsing error|Value error|Invalid choice|Missing argument|Required options|Missing subcommand)\s*"


def _nearest(name: str, words: str, command: str) -> str | None:
    """The command or flag a misspelled one stands for: tyro's guess of the same command, or the nearest of those its complaint names."""
    _, told, guesses = words.partition("Perhaps you meant: ")
    if told:
        flags = re.findall(r"(?:^|--help )(?:\[\.{3}\] )?(--[\w.]+),? (.*?)(?= --help (?:\[\.{3}\] )?--|$)", guesses)
        here = [flag for flag, about in flags if f"in {command}" in f"{about} " and flag != name]
        return next(iter(here), None)
    known = re.search(r"Available subcommands: ((?:[\w-]+, )*[\w-]+)", words)
    names = known.group(1).split(", ") if known and not name.startswith("-") else re.findall(r"--[\w.]+", words.replace(name, ""))
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)

"""Votes that the preference page wrote: how often each side was preferred, and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megasora.config.errors import UserError
from megasora.evaluation.intervals import wilson_interval

FORMAT = "megasora votes 1"
Choice = Literal["a", "b", "tie"]


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One answer."""

    pair: str
    choice: Choice
    left: Literal["a", "b"]
    """Whose clip stood on the left."""


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """One voter's file."""

    path: Path
    page: str
    voter: str
    a: str
    b: str
    pairs: int
    """Pairs the page had."""
    votes: tuple[Vote, ...]


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of votes with the 95 % interval of Wilson; of no vote it is unknown."""

    count: int
    of: int
    share: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Preference:
    """All votes between two sets of clips."""

    a: str
    b: str
    voters: int
    prefer_a: Share
    """Of all votes; so with the next two."""
    prefer_b: Share
    tie: Share
    decided_a: Share
    """A among the votes that were no tie."""
    left: Share
    """The left clip among the votes that were no tie: far from one half, voters looked at the place."""


def share(count: int, of: int) -> Share:
    """A share with its interval."""
    if of == 0:
        return Share(count=count, of=of, share=None, low=None, high=None)
    low, high = wilson_interval(count, of)
    return Share(count=count, of=of, share=count / of, low=low, high=high)


def read_ballot(path: Path) -> Ballot:
    """A vote file.

    Raises:
        UserError: not one, or a vote in it is none.
    """
    if not path.is_file():
        raise UserError(f"no votes at {path}")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(held, dict) or held.get("format") != FORMAT:
            raise ValueError("it is not marked as one")
        votes = tuple(Vote(pair=str(vote["pair"]), choice=vote["choice"], left=vote["left"]) for vote in held["votes"])
        for vote in votes:
            if vote.choice not in ("a", "b", "tie") or vote.left not in ("a", "b"):
                raise ValueError(f"the vote on {vote.pair} is none")
        if len({vote.pair for vote in votes}) != len(votes):
            raise ValueError("a pair was voted on twice")
        names = {name: str(held[name]) for name in ("page", "voter", "a", "b")}
        return Ballot(path=path, pairs=int(held["pairs"]), votes=votes, **names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no file of votes as the page downloads it ({type(error).__name__}: {error})") from error


def preferences(ballots: Sequence[Ballot]) -> list[Preference]:
    """Votes by the two sets they compare; those whose sets stand the other way round are turned.

    Raises:
        UserError: two files of one voter on one page, of which one must be an older state of the other.
    """
    seen: dict[tuple[str, str], Path] = {}
    groups: dict[tuple[str, str], list[Ballot]] = {}
    for ballot in ballots:
        known = seen.setdefault((ballot.page, ballot.voter), ballot.path)
        if known is not ballot.path:
            raise UserError(f"{known} and {ballot.path} are of one voter and one page; give the later one only")
        names = (ballot.a, ballot.b)
        groups.setdefault(names if names in groups or names[::-1] not in groups else names[::-1], []).append(ballot)
    return [_preference(a, b, group) for (a, b), group in groups.items()]


def _preference(a: str, b: str, group: Sequence[Ballot]) -> Preference:
    votes = [vote if ballot.a == a else _turned(vote) for ballot in group for vote in ballot.votes]
    for_a, for_b, ties = (sum(vote.choice == choice for vote in votes) for choice in ("a", "b", "tie"))
    decided = for_a + for_b
    return Preference(
        a=a,
        b=b,
        voters=len({ballot.voter for ballot in group}),
        prefer_a=share(for_a, len(votes)),
        prefer_b=share(for_b, len(votes)),
        tie=share(ties, len(votes)),
        decided_a=share(for_a, decided),
        left=share(sum(vote.choice == vote.left for vote in votes), decided),
    )


def _turned(vote: Vote) -> Vote:
    other: dict[str, Any] = {"a": "b", "b": "a", "tie": "tie"}
    return Vote(pair=vote.pair, choice=other[vote.choice], left=other[vote.left])


def render(found: Iterable[Preference], ballots: Sequence[Ballot]) -> None:
    """Print a table for every two sets, and what is unfinished."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for result in found:
        voters = f"{result.voters} voter{'s' if result.voters > 1 else ''}"
        title = f"{escape(result.a)} against {escape(result.b)}: {result.prefer_a.of} votes of {voters}"
        table = Table("", "votes", "share", "95 % (Wilson)", title=title)
        rows = (
            (f"{result.a} preferred", result.prefer_a),
            (f"{result.b} preferred", result.prefer_b),
            ("no difference", result.tie),
            (f"{result.a} where one was preferred", result.decided_a),
            ("the left clip where one was preferred", result.left),
        )
        for name, value in rows:
            table.add_row(escape(name), f"{value.count} of {value.of}", *_percent(value))
        console.print(table)
    for ballot in ballots:
        if len(ballot.votes) < ballot.pairs:
            console.print(
                f"{ballot.path}: {len(ballot.votes)} of {ballot.pairs} pairs were voted on", highlight=False, markup=False, soft_wrap=True
            )


def _percent(value: Share) -> tuple[str, str]:
    if value.share is None or value.low is None or value.high is None:
        return "-", "-"
    return f"{100 * value.share:.1f} %", f"{100 * value.low:.1f} to {100 * value.high:.1f} %"


def as_dict(found: Iterable[Preference], ballots: Iterable[Ballot]) -> dict[str, Any]:
    """For JSON."""
    files = [{"path": str(ballot.path), "voter": ballot.voter, "votes": len(ballot.votes), "pairs": ballot.pairs} for ballot in ballots]
    return {"preferences": [asdict(result) for result in found], "files": files}

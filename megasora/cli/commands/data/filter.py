"""`megasora data filter`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from megasora.cli.endings import Answer, file_errors, lines
from megasora.cli.parsing import parse_some
from megasora.config.io import to_dict
from megasora.curation.rules import STAGES, FilterRules, StageName
from megasora.curation.settings import FilterSettings

EXTRA = "data"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Keep the clips that pass a stage's rules, as a training manifest; removed ones go to <output>.removed.parquet with their reasons."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")]
    """Table that score wrote."""
    settings: Annotated[FilterSettings, tyro.conf.arg(name="")]
    rules: Annotated[FilterRules, tyro.conf.arg(name="")]
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class _Stage:
    stage: StageName = "256px"


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The rules of the stage."""
    return {"rules": STAGES[parse_some(_Stage, words).stage]}


def run(args: Args) -> Answer:
    """Write the manifest."""
    from megasora.curation.selection import run_filter

    with file_errors():
        result = run_filter(args.source, args.settings, args.rules)
    return Answer(data=to_dict(result), show=lines(_lines(result)))


def _lines(result: Any) -> list[str]:
    said = [f"{rule.removed:>10,}  {rule.reason}" for rule in result.rules if rule.removed]
    share = result.kept / result.clips
    said.append(
        f"{result.kept:>10,}  kept of {result.clips:,} ({share:.1%}), {result.kept_hours:.2f} of {result.hours:.2f} hours: {result.output}"
    )
    if result.without_caption:
        said.append(f"{result.without_caption:>10,}  of them have no caption; give --captions, or score --captioner")
    if result.unknown_captions:
        said.append(f"{result.unknown_captions:>10,}  captions belong to no clip of the table")
    return said

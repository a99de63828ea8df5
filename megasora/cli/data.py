"""`megasora data ...`: from a folder of files to a training set. Flags come from the stages' own settings."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, cast

import tyro

from megasora.cli.parsing import file_errors, flags_of, parse, partition, paths, run_config, underscored
from megasora.cli.progress import row_bar
from megasora.config.errors import UserError
from megasora.config.io import to_dict
from megasora.config.validate import raise_on_problems


@dataclass(frozen=True, kw_only=True)
class PackStatsArgs:
    """Simulates the packs of a stage on a number of replicas, without GPUs; also takes --data.* and --parallel.* of the recipe."""

    recipe: str = "opensora2_stage1"
    """Recipe or config.yaml whose settings are used."""
    dp: int
    """Data-parallel replicas."""
    steps: int | None = None
    """Steps to simulate; None takes a whole epoch."""
    buckets: bool = False
    """Also simulate the published bucket scheme on the same samples."""
    json: bool = False
    """Print JSON."""


def run(arguments: list[str]) -> None:
    """probe, shots, score, filter, report, encode, pack-stats: raw clips to a training set (megasora data --help)."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: megasora data COMMAND INPUT --output OUTPUT [flags]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}")
        print("\nmegasora data COMMAND --help lists the flags.")
        return
    name = arguments[0].replace("_", "-")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UserError(f"no command data {arguments[0]!r}{f'; did you mean {near[0]}?' if near else '; try megasora data --help'}")
    try:
        COMMANDS[name](arguments[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("megasora"):
            raise
        raise UserError(
            f'data {name} needs the package of {error.name}: pip install "megasora[data]"; megasora doctor lists all'
        ) from error


def _parsed(arguments: list[str], *, name: str, parts: dict[str, type], defaults: dict[str, Any] | None = None) -> tuple[Path, Any]:
    """(input, settings of the parts in one flat set of flags, and `json`)."""
    given = defaults or {}
    members: list[Any] = [(part, kind, given[part]) if part in given else (part, kind) for part, kind in parts.items()]
    kind = make_dataclass("Args", [*members, ("json", bool, False)], frozen=True, kw_only=True)
    kind.__doc__ = next(iter(parts.values())).__doc__
    flat = cast(Any, tyro.conf.OmitArgPrefixes)[kind]
    (source,) = paths(arguments, 1, usage=f"megasora data {name} INPUT --output OUTPUT", kind=flat)
    return source, parse(flat, [underscored(word) for word in arguments[1:]], prog=f"megasora data {name}")


def _interrupted(output: Path) -> str:
    return f"interrupted; what is done is kept beside {output}: the same command goes on"


def _say(result: Any, as_json: bool, lines: Callable[[], list[str]]) -> None:
    print(json.dumps(to_dict(result)) if as_json else "\n".join(lines()))


def _stage_lines(summary: Any) -> list[str]:
    """What a stage over rows did, for a person."""
    rate = (summary.rows_in - summary.resumed) / summary.seconds if summary.seconds else 0.0
    lines = [f"{summary.output}: {summary.rows_out:,} rows from {summary.rows_in:,} in {summary.seconds:.1f} s ({rate:.1f} a second)"]
    if summary.resumed:
        lines.append(f"{summary.resumed:,} of them were done by an earlier run")
    if summary.failed:
        lines.append(f"{summary.failed:,} could not be used; the reasons are in the table, megasora data report counts them")
    return lines


def _probe(arguments: list[str]) -> None:
    """FOLDER or TABLE: container facts of every file, broken ones with their reason."""
    from megasora.curation.pool import Limits
    from megasora.curation.probe import ProbeSettings, run_probe

    source, args = _parsed(arguments, name="probe", parts={"settings": ProbeSettings, "limits": Limits})
    with row_bar("probe") as bar, file_errors(_interrupted(args.settings.output)):
        summary, ignored = run_probe(source, args.settings, limits=args.limits, on_progress=bar.update)
    note = [f"{ignored:,} files with other endings were left out"] if ignored else []
    _say(summary, args.json, lambda: _stage_lines(summary) + note)


def _shots(arguments: list[str]) -> None:
    """PROBE_TABLE: shots of one scene, without black borders, as frame ranges or new files."""
    from megasora.curation.pool import Limits
    from megasora.curation.shots import ShotsSettings, run_shots

    source, args = _parsed(arguments, name="shots", parts={"settings": ShotsSettings, "limits": Limits})
    with row_bar("shots") as bar, file_errors(_interrupted(args.settings.output)):
        summary = run_shots(source, args.settings, limits=args.limits, on_progress=bar.update)
    _say(summary, args.json, lambda: _stage_lines(summary))


def _score(arguments: list[str]) -> None:
    """SHOTS_TABLE: motion, blur, light, jitter, text, hashes, aesthetics of every clip."""
    from megasora.curation.pool import Limits
    from megasora.curation.score import ScoreSettings, run_score

    source, args = _parsed(arguments, name="score", parts={"settings": ScoreSettings, "limits": Limits})
    with row_bar("score") as bar, file_errors(_interrupted(args.settings.output)):
        summary = run_score(source, args.settings, limits=args.limits, on_progress=bar.update)
    _say(summary, args.json, lambda: _stage_lines(summary))


def _filter(arguments: list[str]) -> None:
    """SCORED_TABLE [--stage 256px|256px_i2v|768px] [rules]: keep the clips that pass, as a training manifest."""
    from megasora.curation.rules import STAGES, FilterRules
    from megasora.curation.selection import FilterSettings, run_filter

    # the stage sets the rules' defaults, so it is looked up before the other flags are read
    words = [underscored(word) for word in arguments]
    stage = next(
        (
            word.partition("=")[2] or after
            for word, after in zip(words, [*words[1:], ""], strict=True)
            if word.partition("=")[0] == "--stage"
        ),
        "256px",
    )
    if stage not in STAGES:
        raise UserError(f"--stage {stage!r} is not one of {', '.join(STAGES)}")
    defaults = {"rules": STAGES[stage]}  # type: ignore[index]
    source, args = _parsed(arguments, name="filter", parts={"settings": FilterSettings, "rules": FilterRules}, defaults=defaults)
    with file_errors():
        result = run_filter(source, args.settings, args.rules)
    _say(result, args.json, lambda: _filter_lines(result))


def _filter_lines(result: Any) -> list[str]:
    """What a filter kept, for a person."""
    lines = [f"{rule.removed:>10,}  {rule.reason}" for rule in result.rules if rule.removed]
    share = result.kept / result.clips
    lines.append(
        f"{result.kept:>10,}  kept of {result.clips:,} ({share:.1%}), {result.kept_hours:.2f} of {result.hours:.2f} hours: {result.output}"
    )
    if result.without_caption:
        lines.append(f"{result.without_caption:>10,}  of them have no caption; give --captions, or score --captioner")
    if result.unknown_captions:
        lines.append(f"{result.unknown_captions:>10,}  captions belong to no clip of the table")
    return lines


def _report(arguments: list[str]) -> None:
    """MANIFEST: one HTML page about what filter did."""
    from megasora.curation.report import ReportSettings, run_report

    source, args = _parsed(arguments, name="report", parts={"settings": ReportSettings})
    with file_errors():
        path = run_report(source, args.settings)
    print(json.dumps({"output": str(path)}) if args.json else str(path))


def _encode(arguments: list[str]) -> None:
    """RECIPE --data.manifest M --output DIR [...]: latents, condition frames and text into shards that training reads."""
    from megasora.training.encode import EncodeSettings, run_encode  # the settings stand with the code, so even --help needs torch

    own = {*flags_of(EncodeSettings), "--no_verify", "--json"}
    kind = make_dataclass("Args", [("settings", EncodeSettings), ("json", bool, False)], frozen=True, kw_only=True)
    kind.__doc__ = EncodeSettings.__doc__
    flat = cast(Any, tyro.conf.OmitArgPrefixes)[kind]
    if arguments[:1] in ([], ["--help"], ["-h"]) or "--help" in arguments or "-h" in arguments:
        parse(flat, ["--help"], prog="megasora data encode RECIPE [--section.field value ...]")
    mine, rest = partition([underscored(word) for word in arguments[1:]], own)
    config = run_config([arguments[0], *rest], command="data encode")
    args = parse(flat, mine, prog="megasora data encode")
    interrupted = f"interrupted; finished shards are kept in {args.settings.output}: the same command goes on"
    with row_bar("encode") as bar, file_errors(interrupted):
        result = run_encode(
            config,
            args.settings,
            on_start=lambda size: None if args.json else print(size.line),
            on_progress=lambda done, total, _: bar.update(done, total, 0),
        )
    _say(result, args.json, lambda: _encode_lines(result))


def _encode_lines(result: Any) -> list[str]:
    """What a task encoded, for a person."""
    rate = result.samples / result.seconds if result.seconds else 0.0
    lines = [
        f"{result.output}: {len(result.made)} shards made with {result.samples:,} clips, {result.bytes_written / 1e9:.2f} GB in "
        f"{result.seconds:.0f} s ({rate:.1f} clips a second); {len(result.kept)} were there"
    ]
    if result.failed:
        lines.append(f"{result.failed:,} clips could not be encoded; the reasons stand in the shards' failed.jsonl")
    if result.unplanned:
        lines.append(f"{result.unplanned:,} rows of the manifest fit no shape; the reasons stand in unplanned.jsonl")
    if result.missing:
        lines.append(f"{len(result.missing)} shards of other tasks are not finished yet")
    return lines


def _pack_stats(arguments: list[str]) -> None:
    """MANIFEST --dp N [--recipe R] [--buckets] [...]: balance and padding of a stage's packs, without GPUs."""
    (manifest,) = paths(arguments, 1, usage="megasora data pack-stats MANIFEST --dp N", kind=PackStatsArgs)
    own = {f"--{field.name}" for field in fields(PackStatsArgs)}
    mine, rest = partition([underscored(a) for a in arguments[1:]], own)
    args = parse(PackStatsArgs, mine, prog="megasora data pack-stats")
    config = run_config([args.recipe, *rest], command="data pack-stats")
    if args.dp < 1 or (args.steps is not None and args.steps < 1):
        raise UserError(f"--dp {args.dp} and --steps {args.steps} must be positive")
    raise_on_problems(config, world_size=args.dp * config.parallel.model_parallel_size, check_memory=False)
    from megasora.data.pack_stats import render, stats_of_run

    facts = stats_of_run(config, manifest, replicas=args.dp, steps=args.steps, buckets=args.buckets)
    print(json.dumps(facts)) if args.json else render(facts)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "probe": _probe,
    "shots": _shots,
    "score": _score,
    "filter": _filter,
    "report": _report,
    "encode": _encode,
    "pack-stats": _pack_stats,
}

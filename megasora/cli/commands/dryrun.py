"""`megasora dryrun`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megasora.cli.endings import Answer, file_errors
from megasora.cli.recipe_arguments import RecipeArgs, config_defaults
from megasora.config.errors import UserError
from megasora.config.io import to_dict
from megasora.perf.hardware import Hardware, load_hardware


@dataclass(frozen=True, kw_only=True)
class Args(RecipeArgs):
    """One rank of a job on any number of GPUs, run for real on fake tensors: FLOPs, messages and memory of a step, without a GPU."""

    gpus: int = 1
    """World size of the job."""
    rank: int | None = None
    """Which rank; 0 if neither this nor --all is given."""
    all: bool = False
    """One rank of every kind of rank there is, in as many processes as there are cores."""
    clips: Literal["auto", "manifest", "largest", "drawn"] = "auto"
    """What the step's packs are filled with: the manifest's clips, nothing but the largest clip, or clips drawn as a curated set has them;
    auto takes the manifest where the recipe has one, else largest."""
    gpu: str = "h200"
    """Whose memory the peak is held against: a profile as megasora plan takes it."""
    json: bool = False
    """Print JSON."""
    output: Path | None = None
    """Folder for dryrun.json, with everything: every pass of the timeline and every group's ranks."""


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return config_defaults(words, command="dryrun")


def run(args: Args) -> Answer:
    """A rank, or one of each class."""
    if args.all and args.rank is not None:
        raise UserError("--all runs a rank of every kind; give it or --rank, not both")
    warnings.filterwarnings("ignore")  # Megatron's, of packages that a dry run does not need
    gpu = load_hardware(args.gpu)
    answer = _all(args, gpu) if args.all else _one(args, gpu)
    if args.output is not None:
        _write(args.output, answer.data)
    return answer


def _one(args: Args, gpu: Hardware) -> Answer:
    from megasora.scaling.dryrun.expected import compare
    from megasora.scaling.dryrun.report import show_run
    from megasora.scaling.dryrun.room import room_of
    from megasora.scaling.dryrun.run import dry_run

    found = dry_run(args.config, world_size=args.gpus, rank=args.rank or 0, clips=args.clips)
    room = room_of([found], args.config, gpu=gpu)
    data = {**to_dict(found), "compared": to_dict(compare(found, args.config)), "room": room.data()}
    return Answer(data=data, show=lambda: show_run(found, args.config, room))


def _all(args: Args, gpu: Hardware) -> Answer:
    from megasora.cli.progress import row_bar
    from megasora.scaling.dryrun.expected import compare
    from megasora.scaling.dryrun.jobs import dry_run_all
    from megasora.scaling.dryrun.report import show_classes
    from megasora.scaling.dryrun.room import room_of

    with row_bar("classes of ranks") as bar:
        runs = dry_run_all(
            args.config, world_size=args.gpus, clips=args.clips, advance=lambda done, total: bar.update(done, total, failed=0)
        )
    classes = [{"class": to_dict(one.of), "run": to_dict(one.run), "compared": to_dict(compare(one.run, args.config))} for one in runs]
    room = room_of([one.run for one in runs], args.config, gpu=gpu)
    data = {"recipe": args.config.recipe, "world_size": args.gpus, "classes": classes, "room": room.data()}
    return Answer(data=data, show=lambda: show_classes(runs, args.config, room))


def _write(folder: Path, data: object) -> None:
    from megasora.config.files import written_whole

    with file_errors():
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / "dryrun.json") as temporary:
            temporary.write_text(json.dumps(data, indent=1))

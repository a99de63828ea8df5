"""`megasora study run`."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from megasora.cli.endings import Answer, file_errors
from megasora.config.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

    from megasora.scaling.study.launch import Launcher, Task
    from megasora.scaling.study.outcome import Outcome
    from megasora.scaling.study.results import Results
    from megasora.scaling.study.run import Say, Study


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure every point of a grid file by a training run of its own; the same command goes on where it was interrupted."""

    grid: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="GRID.yaml")]
    """Recipe, layouts, sizes and numbers of ranks; examples/scaling has some."""
    output: Path
    """Folder of the study."""
    launcher: Literal["local", "slurm"] = "local"
    """local: torchrun on this machine, one run after the other; slurm: each run a job, several at once."""
    hardware: str | None = None
    """Profile to predict every point on: a name (h200, h100:ib200) or a file that `study calibrate` wrote."""
    retry_failed: bool = False
    """Run again what failed, was refused by the run itself, timed out or ran out of memory."""
    dry: bool = False
    """List the points and those that validate refuses; run nothing."""
    json: bool = False
    """Print the results as JSON."""


def run(args: Args) -> Answer:
    """Exit code 0 also where points failed: their reasons stand in the table."""
    from megasora.scaling.study.grid import read_grid
    from megasora.scaling.study.predicted import predictor
    from megasora.scaling.study.run import collect_study, open_folder, plan_study, run_study

    grid = read_grid(args.grid)
    predict = predictor(args.hardware)
    study = plan_study(grid, args.output.absolute())
    if args.dry:
        return Answer(data=_planned(study), show=lambda: _show_plan(study))
    launcher = _launcher(args, study)
    command = _command(args)
    try:
        with file_errors(f"interrupted; the same command goes on, megasora study report {args.output} shows what there is"):
            open_folder(study)
            collect_study(study, launcher, command=command, predict=predict)
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside as by Ctrl-C: no rank is left behind
            with _progress(len(study.tasks)) as say:
                run_study(study, launcher, say=say, retry_failed=args.retry_failed)
    finally:
        if study.folder.is_dir():
            results = collect_study(study, launcher, command=command, predict=predict)
    return Answer(data=asdict(results), show=lambda: _show(args, results))


def _launcher(args: Args, study: Study) -> Launcher:
    from megasora.scaling.study.launch import LocalLauncher, words_of
    from megasora.scaling.study.slurm import SlurmLauncher, job_of

    grid = study.grid
    if args.launcher == "local":
        return LocalLauncher(grid.recipe, timeout_s=grid.timeout_s, environment=words_of(grid.environment))
    for task in study.tasks:
        job_of(task, recipe=grid.recipe, settings=grid.slurm)
    return SlurmLauncher(grid.recipe, grid.slurm)


def _command(args: Args) -> str:
    words = ["megasora", "study", "run", str(args.grid), "--output", str(args.output)]
    words += ["--launcher", args.launcher] if args.launcher != "local" else []
    return shlex.join([*words, *(["--hardware", args.hardware] if args.hardware else [])])


@contextmanager
def _progress(total: int) -> Iterator[Say]:
    """A line for every end, and a bar with the running point where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("study"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
        console=console,
        disable=not console.is_terminal,
    )
    number = bar.add_task("study", total=total, now="")

    def say(task: Task, outcome: Outcome | None, done: int, _: int) -> None:
        name = f"{task.point.id} repeat {task.repeat}"
        if outcome is None:
            bar.update(number, completed=done, now=name)
            return
        bar.update(number, completed=done)
        reason = f": {outcome.reason}" if outcome.reason else ""
        _print(bar, f"{done:>4} of {total}  {name}: {outcome.status} after {outcome.seconds:.0f} s{reason}")

    with bar:
        yield say


def _print(bar: Progress, text: str) -> None:
    bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _planned(study: Study) -> dict[str, object]:
    points = [
        {"id": point.id, "gpus": point.gpus, "axes": point.axes, "scaling": point.scaling, "refused": study.refused.get(point.id)}
        for point in study.points
    ]
    return {"points": points, "runs": len(study.tasks)}


def _show_plan(study: Study) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(study.points)} points, {len(study.tasks)} runs of {study.grid.steps} steps")
    for heading in ("point", "ranks", "TP", "PP", "VP", "CP", "DP", "scaling"):
        left = heading in ("point", "scaling")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading == "point", overflow="fold")
    for point in study.points:
        sizes = ["" if size is None else str(size) for size in point.axes.values()]
        table.add_row(point.id, str(point.gpus), *sizes, "refused" if point.id in study.refused else " ".join(point.scaling))
    console = Console()
    console.print(table)
    for name, reason in study.refused.items():
        console.print(f"{name}: {reason}", highlight=False, markup=False, soft_wrap=True)


def _show(args: Args, results: Results) -> None:
    from megasora.scaling.study.tables import print_results

    print_results(results)
    if not results.done:
        raise UserError(
            f"no point of {args.grid} has figures; the reasons stand above, the logs in {args.output}/points/*/repeat_*/log.txt"
        )
    print(f"megasora study report {args.output} draws them")

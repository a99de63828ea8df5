"""The loop of a study: what is left to do, in which order, until every run of every point has an outcome.

A folder of a study: grid.yaml, results.json, points/ID/repeat_N/{run/, log.txt, outcome.json}.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from megasora.config.files import written_whole
from megasora.config.io import to_dict
from megasora.scaling.study.collect import collect
from megasora.scaling.study.grid import Grid, Point, points_of, refusal, settings_of
from megasora.scaling.study.launch import Handle, Launcher, Task, shown
from megasora.scaling.study.machine import describe_machine, git_commit, versions
from megasora.scaling.study.outcome import Outcome, judge, read_outcome, write_outcome
from megasora.scaling.study.predicted import Predict, Predicted
from megasora.scaling.study.results import PointResult, Results, write_results
from megasora.scaling.study.trace.summary import mean_parts
from megasora.slurm.flags import changed_flags

OUTCOME = "outcome.json"
Say = Callable[[Task, Outcome | None, int, int], None]
"""(task, its outcome or None when it starts, runs done, all runs)."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A grid in its folder."""

    grid: Grid
    folder: Path
    points: tuple[Point, ...]
    refused: dict[str, str]
    """Point -> why it cannot run."""
    tasks: tuple[Task, ...]
    """All runs, in the order in which they are made."""


def plan_study(grid: Grid, folder: Path) -> Study:
    """What a study consists of.

    Raises:
        UserError: the grid names a setting that does not exist.
    """
    points = points_of(grid)
    refused = {point.id: reason for point in points if (reason := refusal(point)) is not None}
    able = [point for point in points if point.id not in refused]
    tasks = [_task(grid, point, repeat, folder) for repeat, order in enumerate(orders(grid, able), 1) for point in order]
    return Study(grid=grid, folder=folder, points=tuple(points), refused=refused, tasks=tuple(tasks))


def orders(grid: Grid, points: Sequence[Point]) -> list[list[Point]]:
    """The points of each repeat in an order of its own: a machine that slows down over hours then slows no layout more than others."""
    found = []
    for repeat in range(grid.repeats):
        order = list(points)
        random.Random(f"{grid.seed}:{repeat}").shuffle(order)
        found.append(order)
    return found


def _task(grid: Grid, point: Point, repeat: int, folder: Path) -> Task:
    config = point.config
    if grid.profile_steps is not None and repeat == 1:
        config = replace(config, profile=replace(config.profile, steps=grid.profile_steps))
    flags = tuple(changed_flags(settings_of(grid.recipe), config))
    return Task(point=replace(point, config=config), repeat=repeat, flags=flags, folder=folder / "points" / point.id / f"repeat_{repeat}")


def open_folder(study: Study) -> None:
    """Make the study's folder, with its grid."""
    study.folder.mkdir(parents=True, exist_ok=True)
    with written_whole(study.folder / "grid.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(to_dict(study.grid), sort_keys=False))


def outcome_of(task: Task, launcher: Launcher) -> Outcome | None:
    """The task's result; None where there is none, or one of another command."""
    found = read_outcome(task.folder / OUTCOME)
    return found if found is not None and found.command == shown(launcher.command(task), task.point.gpus) else None


def run_study(study: Study, launcher: Launcher, *, say: Say, retry_failed: bool = False) -> None:
    """Make every run that has no outcome.

    Args:
        study: see `plan_study`; its folder is there.
        launcher: of the runs.
        say: hears of every start and end.
        retry_failed: run again what did not end well.

    Raises:
        UserError: runs cannot be started here.
    """
    left = deque(task for task in study.tasks if _is_left(outcome_of(task, launcher), retry_failed=retry_failed))
    total, done = len(study.tasks), len(study.tasks) - len(left)
    running: list[tuple[Task, Handle, float]] = []
    try:
        while left or running:
            while left and len(running) < launcher.at_once:
                task = left.popleft()
                say(task, None, done, total)
                running.append((task, _start(task, launcher), time.time()))
            for entry in list(running):
                outcome = _ended(*entry, launcher=launcher, steps=study.grid.steps)
                if outcome is not None:
                    running.remove(entry)
                    done += 1
                    say(entry[0], outcome, done, total)
            if running:
                time.sleep(launcher.poll_s)
    finally:
        for _, handle, _ in running:
            handle.interrupted()


def _is_left(outcome: Outcome | None, *, retry_failed: bool) -> bool:
    return outcome is None or (retry_failed and outcome.status != "done")


def _start(task: Task, launcher: Launcher) -> Handle:
    stale = read_outcome(task.folder / OUTCOME) is not None
    if (stale or not (task.folder / "job").exists()) and task.folder.exists():  # a job that was submitted goes on
        shutil.rmtree(task.folder)
    task.folder.mkdir(parents=True, exist_ok=True)
    return launcher.start(task)


def _ended(task: Task, handle: Handle, started: float, *, launcher: Launcher, steps: int) -> Outcome | None:
    ended = handle.poll()
    if ended is None:
        return None
    status, reason = judge(ended, run_dir=task.run_dir, log=task.log, steps=steps)
    command = shown(launcher.command(task), task.point.gpus)
    outcome = Outcome(status=status, reason=reason, seconds=time.time() - started, started=started, command=command)
    write_outcome(outcome, task.folder / OUTCOME)
    shutil.rmtree(task.run_dir / "assets", ignore_errors=True)  # made clips and encoders: tens of megabytes a point
    return outcome


def collect_study(study: Study, launcher: Launcher, *, command: str, predict: Predict | None = None) -> Results:
    """Everything that is known so far, also written to results.json.

    Args:
        study: see `plan_study`.
        launcher: that its runs were made with.
        command: that makes the study.
        predict: what a point should need.
    """
    results = Results(
        name=study.folder.name,
        created=time.strftime("%Y-%m-%d %H:%M:%S"),
        command=command,
        machine=describe_machine(),
        versions=versions(),
        commit=git_commit(),
        grid=to_dict(study.grid),
        points=tuple(_result(study, point, launcher, predict) for point in study.points),
    )
    write_results(results, study.folder)
    return results


def _result(study: Study, point: Point, launcher: Launcher, predict: Predict | None) -> PointResult:
    known = {"id": point.id, "layout": point.layout, "size": point.size, "gpus": point.gpus, "scaling": point.scaling, "axes": point.axes}
    if point.id in study.refused:
        return PointResult(**known, status="refused", reason=study.refused[point.id])  # type: ignore[arg-type]
    tasks = sorted((task for task in study.tasks if task.point.id == point.id), key=lambda task: task.repeat)
    ends = [(task, outcome) for task in tasks if (outcome := outcome_of(task, launcher)) is not None]
    good = [task for task, outcome in ends if outcome.status == "done"]
    first = next((outcome for _, outcome in ends if outcome.status != "done"), None)
    metrics = collect([task.run_dir for task in good], warmup_steps=study.grid.warmup_steps)
    predicted = None if predict is None else predict(point.config, point.gpus)
    return PointResult(
        **known,  # type: ignore[arg-type]
        status="done" if metrics else first.status if first else "failed" if ends else "missing",
        reason=first.reason if first else "" if metrics else "no step counted" if ends else "has not run yet",
        repeats=len(good),
        command=ends[0][1].command if ends else "",
        metrics=metrics,
        predicted=None if predicted is None else _plain(predicted),
        trace=mean_parts([task.run_dir / "profile" for task in good]),
    )


def _plain(predicted: Predicted) -> dict[str, object]:
    return {
        "step_time_s": predicted.step_time_s,
        "peak_memory_bytes": predicted.peak_memory_bytes,
        "communication_bytes": dict(predicted.communication_bytes),
        "parts": dict(predicted.parts),
    }

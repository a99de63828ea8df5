"""The loop of a study: orders, resumption, outcomes; runs are files that a stand-in writes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megasora.config.errors import UserError
from megasora.scaling.study.grid import Grid, SlurmSettings
from megasora.scaling.study.launch import Handle, LocalLauncher, Task
from megasora.scaling.study.outcome import Ended, judge, last_error, read_outcome
from megasora.scaling.study.run import collect_study, open_folder, orders, plan_study, run_study
from megasora.scaling.study.slurm import SlurmHandle, SlurmLauncher

GRID = Grid(
    recipe="tiny", gpus=(1, 2), layouts={"dp": {}, "tp2": {"tp": 2}}, steps=4, warmup_steps=2, repeats=2, overrides={"device": "cpu"}
)


class Ends:
    """A run that has ended already."""

    def __init__(self, ended: Ended) -> None:
        self.ended = ended

    def poll(self) -> Ended | None:
        return self.ended

    def interrupted(self) -> None:
        raise AssertionError("it has ended")


class Written:
    """Writes the steps of a run at once; layouts in `failing` write an error instead, and `interrupt` stops the study before a run."""

    at_once, poll_s = 1, 0.0

    def __init__(self, failing: tuple[str, ...] = (), interrupt: int | None = None) -> None:
        self.failing, self.interrupt, self.started = failing, interrupt, list[str]()

    def command(self, task: Task) -> list[str]:
        return ["megasora", "train", "tiny", *task.flags]

    def start(self, task: Task) -> Handle:
        if len(self.started) == self.interrupt:
            raise KeyboardInterrupt
        self.started.append(f"{task.point.id}/{task.repeat}")
        if task.point.layout in self.failing:
            task.log.write_text("step 1\nTraceback ...\nRuntimeError: CUDA out of memory. Tried to allocate 2 GiB\n")
            return Ends(Ended(code=1))
        task.run_dir.mkdir()
        records = [
            {"step": step, "step_time_s": float(step), "tokens_per_s": 100.0 * task.repeat, "samples": 2 * step, "events": []}
            for step in (1, 2, 3, 4)
        ]
        (task.run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return Ends(Ended(code=0))


def run(folder: Path, launcher: Written, grid: Grid = GRID, **how: bool):  # type: ignore[no-untyped-def]
    study = plan_study(grid, folder)
    open_folder(study)
    run_study(study, launcher, say=lambda *_: None, **how)
    return collect_study(study, launcher, command="it")


def test_results_are_medians_over_counted_steps_of_all_repeats(tmp_path: Path) -> None:
    results = run(tmp_path, Written())
    by_id = {point.id: point for point in results.points}
    assert list(by_id) == ["dp_1_strong", "dp_2_strong", "tp2_1_strong", "tp2_2_strong"]
    point = by_id["dp_1_strong"]
    time, tokens, samples = (point.metrics[name] for name in ("step_time_s", "tokens_per_s", "samples_per_s"))
    assert (time.count, time.min, time.median, time.max) == (4, 3.0, 3.5, 4.0)  # steps 3 and 4 of both repeats
    assert (tokens.median, samples.median) == (150.0, 2.0)
    assert (by_id["tp2_1_strong"].status, point.repeats) == ("refused", 2)


def test_what_runs_out_of_memory_stays_with_its_reason_and_is_retried_when_asked(tmp_path: Path) -> None:
    results = run(tmp_path, Written(failing=("tp2",)))
    failed = next(point for point in results.points if point.id == "tp2_2_strong")
    assert (failed.status, failed.metrics) == ("out_of_memory", {})
    assert failed.reason == "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"
    again, retried = Written(), Written()
    run(tmp_path, again)
    assert again.started == []
    results = run(tmp_path, retried, retry_failed=True)
    assert sorted(retried.started) == ["tp2_2_strong/1", "tp2_2_strong/2"]
    assert [point.status for point in results.points] == ["done", "done", "refused", "done"]


def test_an_interrupted_study_goes_on_where_it_was(tmp_path: Path) -> None:
    first, second = Written(interrupt=2), Written()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, first)
    run(tmp_path, second)
    assert len(first.started) == 2
    assert len(second.started) == 4
    assert len({*first.started, *second.started}) == 6


def test_a_point_whose_settings_changed_runs_again(tmp_path: Path) -> None:
    run(tmp_path, Written())
    again = Written()
    changed = {**GRID.layouts, "tp2": {"tp": 2, "train.seed": 7}}
    run(tmp_path, again, Grid(**{**GRID.__dict__, "layouts": changed}))
    assert sorted(again.started) == ["tp2_2_strong/1", "tp2_2_strong/2"]


def test_every_repeat_has_an_order_of_its_own() -> None:
    grid = Grid(**{**GRID.__dict__, "gpus": (1, 2, 3, 4, 5, 6), "repeats": 3, "layouts": {"dp": {}}})
    found = orders(grid, plan_study(grid, Path("x")).points)
    ids = [[point.id for point in order] for order in found]
    assert len({tuple(order) for order in ids}) == 3
    assert len({frozenset(order) for order in ids}) == 1


@pytest.mark.parametrize(
    ("ended", "log", "status", "reason"),
    [
        (Ended(code=2), "megasora: error: --lr 0 is wrong; use 1\n", "refused", "--lr 0 is wrong; use 1"),
        (Ended(code=1), "[rank1]: ValueError: no\n", "failed", "ValueError: no"),
        (Ended(code=1), "", "failed", "exit code 1 at step 0 of 3; see log.txt"),
        (Ended(code=0), "", "failed", "exit code 0 at step 0 of 3; see log.txt"),
        (Ended(code=-1, timed_out=True), "", "timeout", "stopped at step 0 of 3: it took longer than timeout_s"),
        (Ended(code=1), "  exitcode  : -9 (pid: 7)\n", "out_of_memory", "a rank was killed (SIGKILL)"),
    ],
)
def test_an_end_becomes_a_status_and_a_reason(tmp_path: Path, ended: Ended, log: str, status: str, reason: str) -> None:
    (tmp_path / "log.txt").write_text(log)
    assert judge(ended, run_dir=tmp_path / "run", log=tmp_path / "log.txt", steps=3) == (status, reason)


def test_the_first_error_of_a_log_is_the_reason() -> None:
    assert last_error("x\ntorch.OutOfMemoryError: a\nRuntimeError: b\n") == "torch.OutOfMemoryError: a"
    assert last_error("nothing here") is None


def test_a_damaged_outcome_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text("{")
    with pytest.raises(UserError, match="remove it and the point runs again"):
        read_outcome(tmp_path / "outcome.json")


def test_a_run_that_takes_too_long_is_ended_with_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nsleep 600 & echo $! >child; wait\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(sleeper))
    monkeypatch.setattr("megasora.scaling.study.launch.GRACE_S", 0.5)
    monkeypatch.chdir(tmp_path)
    study = plan_study(GRID, tmp_path)
    task = study.tasks[0]
    task.folder.mkdir(parents=True)
    handle = LocalLauncher("tiny", timeout_s=0.5, environment={}).start(task)
    assert handle.poll() is None
    time.sleep(0.8)
    ended = handle.poll()
    assert ended is not None
    assert ended.timed_out
    child = Path(f"/proc/{int((tmp_path / 'child').read_text())}/stat")
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:  # it was killed; the system takes a moment
        time.sleep(0.02)
    assert not alive(child)


def alive(stat: Path) -> bool:
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def fake_slurm(folder: Path, *, state: str, verdict: str) -> None:
    """Commands that submit a job which has ended when it is asked about."""
    end = f"2026-11-28T12:00:00+00:00 job 17 restart 0 step 4: {verdict}"
    sbatch = f'for last; do :; done; dir=$(dirname "$last"); mkdir -p "$dir/run"; echo "{end}" >"$dir/run/restarts.log"; '
    commands(folder, sbatch=sbatch + 'cp "$last" "$dir/seen"; echo 17', scontrol=f'echo "JobId=17 JobState={state} Reason=None"')


def commands(folder: Path, **scripts: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("state", "verdict", "ended"),
    [
        ("RUNNING", "finished", None),
        ("COMPLETED", "finished", Ended(code=0)),
        ("OUT_OF_MEMORY", "crash (exit code 1), requeued", Ended(code=137, said="OUT_OF_MEMORY (Slurm)")),
        ("TIMEOUT", "ended from outside", Ended(code=1, timed_out=True, said="job 17: the job's time limit (slurm.time)")),
        ("FAILED", "not requeued: a mistake that another try would repeat; its cure is above", Ended(code=2)),
        ("CANCELLED", "ended from outside", Ended(code=1, said="job 17: ended from outside")),
        ("PREEMPTED", "ended from outside", Ended(code=1, said="job 17: ended from outside")),
        ("REVOKED", "ended from outside", Ended(code=1, said="job 17: ended from outside")),
        ("REQUEUED", "stopped as asked (preemption or the time limit), requeued", None),
    ],
)
def test_a_job_is_submitted_once_and_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, verdict: str, ended: Ended | None
) -> None:
    fake_slurm(tmp_path / "bin", state=state, verdict=verdict)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    grid = Grid(
        **{
            **GRID.__dict__,
            "gpus": (16,),
            "slurm": SlurmSettings(gpus_per_node=8, account="a"),
            "profile_steps": "3",
            "overrides": {"data.manifest": "clips.parquet"},
        }
    )
    task = plan_study(grid, tmp_path / "study").tasks[0]
    task.folder.mkdir(parents=True)
    launcher = SlurmLauncher("tiny", grid.slurm)
    assert launcher.start(task).poll() == ended
    (tmp_path / "bin" / "sbatch").unlink()  # a second submission would fail
    assert launcher.start(task).poll() == ended
    script = (task.folder / "seen").read_text()
    assert "#SBATCH --nodes=2" in script
    assert str(task.run_dir) in script
    assert "MANIFEST=${MANIFEST:-clips.parquet}" in script  # given once, and not as a flag too
    assert "--data.manifest clips.parquet" not in script
    assert "--profile.steps 3" in script


SILENT = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'
FORGOTTEN = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'


def test_a_controller_that_does_not_answer_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without accounting a running job would look like one that Slurm has forgotten; with it, like an earlier attempt's end."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr("megasora.scaling.study.slurm.SILENCE", 3)
    handle = SlurmHandle("17", run_dir=tmp_path)
    commands(tmp_path / "bin", scontrol=SILENT, sacct="exit 1")
    assert [handle.poll(), handle.poll()] == [None, None]
    commands(tmp_path / "bin", scontrol='echo "JobId=17 JobState=RUNNING"')
    assert handle.poll() is None
    commands(tmp_path / "bin", scontrol=SILENT, sacct="echo PREEMPTED")
    assert [handle.poll(), handle.poll(), handle.poll()] == [None, None, Ended(code=1, said="job 17: PREEMPTED")]


@pytest.mark.parametrize(("accounting", "said"), [("exit 1", "gone from the queue"), ("echo CANCELLED by 7", "CANCELLED")])
def test_a_job_that_slurm_has_forgotten_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accounting: str, said: str) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    commands(tmp_path / "bin", scontrol=FORGOTTEN, sacct=accounting)
    assert SlurmHandle("17", run_dir=tmp_path).poll() == Ended(code=1, said=f"job 17: {said}")


def test_jobs_cannot_be_followed_where_there_is_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted study that goes on elsewhere must not take its jobs for gone."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no scontrol on this machine"):
        SlurmHandle("17", run_dir=tmp_path).poll()


def test_without_slurm_the_local_launcher_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    task = plan_study(GRID, tmp_path / "study").tasks[0]
    task.folder.mkdir(parents=True)
    with pytest.raises(UserError, match="no sbatch on this machine; --launcher local"):
        SlurmLauncher("tiny", SlurmSettings()).start(task)

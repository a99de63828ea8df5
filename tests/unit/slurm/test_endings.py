"""How a job file ends: bash runs it, with stand-ins for Slurm's commands that write down what they are asked."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megasora import recipes
from megasora.slurm.job import SlurmJob
from megasora.slurm.template import render

STEPS = 100
COMMANDS = {
    "squeue": 'echo "$ENDS"',
    "scontrol": 'echo "$*" >>"$ASKED"; [ "$1 $2" = "show job" ] || exit 0; '
    '[ "$(grep -c "show job" "$ASKED")" -gt "$SILENT" ] && echo "JobId=17 JobState=RUNNING"',
    "scancel": 'echo "scancel $*" >>"$ASKED"',
    "sleep": 'echo "sleep $*" >>"$ASKED"',
    "srun": 'printf "%s\\0" "$@" >"$ASKED.srun"; eval "$RANKS"',
}


@dataclass
class Attempt:
    """One attempt of a job, and what it left."""

    folder: Path
    run_dir: Path = field(init=False)

    def __post_init__(self) -> None:
        self.run_dir = self.folder / 'it\'s a "run" of $HOME'
        (self.run_dir / "checkpoints").mkdir(parents=True)
        (self.run_dir / "config.yaml").write_text(f"train:\n  steps: {STEPS}\n")
        (self.folder / "bin").mkdir()
        for name, text in COMMANDS.items():
            path = self.folder / "bin" / name
            path.write_text(f"#!/bin/bash\n{text}\n")
            path.chmod(0o755)

    def recorded(self, text: str) -> None:
        (self.run_dir / "metrics.jsonl").write_text(text)

    def saved(self, step: int, *, named: bool = True, written: float = 0.0) -> None:
        """A checkpoint, `written` seconds after 2026 began; `named` moves the tracker to it."""
        folder = self.run_dir / "checkpoints" / f"step_{step:08d}"
        folder.mkdir()
        files = [folder / "manifest.json"]
        files[0].write_text("{}")
        if named:
            files.append(self.run_dir / "checkpoints" / "latest")
            files[1].write_text(f"{folder.name}\n")
        for file in files:
            os.utime(file, (1767225600 + written,) * 2)

    def run(self, ranks: str = "exit 0", *, restarts: int = 1, setup: tuple[str, ...] = (), **variables: str) -> int:
        """The exit code of a job whose ranks do that."""
        job = SlurmJob(
            recipe="tiny", config=recipes.get("tiny"), flags=(), command="c", nodes=1, gpus_per_node=1, max_restarts=3, setup=setup
        )
        of_slurm = {"JOB_ID": "17", "JOB_NODELIST": "n1", "JOB_NUM_NODES": "1", "CPUS_PER_TASK": "1", "RESTART_COUNT": str(restarts)}
        environment = {
            **{f"SLURM_{name}": value for name, value in of_slurm.items()},
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "ASKED": str(self.folder / "asked"),
            "RUN_DIR": str(self.run_dir),
            "ENDS": "2126-01-01T00:00:00",
            "SILENT": "0",
            "RANKS": ranks,
            **variables,
        }
        done = subprocess.run(
            ["bash", "-c", render(job)], env=environment, cwd=self.folder, capture_output=True, text=True, timeout=30, check=False
        )
        self.said = done.stdout + done.stderr
        return done.returncode

    @property
    def requeues(self) -> int:
        return self.asked.count("requeue 17\n")

    @property
    def asked(self) -> str:
        path = self.folder / "asked"
        return path.read_text() if path.exists() else ""

    @property
    def verdicts(self) -> list[str]:
        return [line.split(" restart ")[1] for line in (self.run_dir / "restarts.log").read_text().splitlines()]


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt(tmp_path)


def lines(last: int) -> str:
    return "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(last - 2, last + 1))


@pytest.mark.parametrize("named", [True, False])
def test_a_last_step_that_is_saved_and_not_recorded_is_the_end(attempt: Attempt, named: bool) -> None:
    """A node died between the two: the next attempt has nothing to do."""
    attempt.saved(80)
    attempt.saved(100, named=named, written=60.0)
    attempt.recorded(lines(99))
    assert attempt.run() == 0
    assert (attempt.verdicts, attempt.requeues) == (["1 step 100: finished"], 0)


def test_a_checkpoint_that_the_run_has_passed_over_is_not_the_end(attempt: Attempt) -> None:
    """A damaged one lies there still; the run went on from an older one, and was stopped."""
    attempt.saved(100)
    attempt.saved(60, written=60.0)
    attempt.recorded(lines(60))
    assert attempt.run() == 0
    assert (attempt.verdicts, attempt.requeues) == (["1 step 60: stopped as asked (preemption or the time limit), requeued"], 1)


def test_a_record_that_was_cut_off_counts_for_nothing(attempt: Attempt) -> None:
    attempt.recorded(lines(99) + '{"step": 10')
    attempt.run()
    assert attempt.verdicts[0].startswith("1 step 99: ")


@pytest.mark.parametrize(
    ("restarts", "saves", "requeues", "code"),
    [(2, False, 1, 0), (3, False, 0, 1), (7, False, 0, 1), (7, True, 1, 0)],
)
def test_stops_that_save_nothing_come_to_an_end(attempt: Attempt, restarts: int, saves: bool, requeues: int, code: int) -> None:
    attempt.saved(9)
    attempt.recorded(lines(30))  # of an attempt that crashed before it saved them
    folder = '"$RUN_DIR/checkpoints/step_00000010"'
    ranks = f'mkdir {folder}; touch {folder}/manifest.json; echo step_00000010 >"$RUN_DIR/checkpoints/latest"' if saves else "exit 0"
    assert attempt.run(ranks, restarts=restarts) == code
    assert attempt.requeues == requeues
    last = "not requeued: stopped without a new checkpoint after 3 restarts (exit code 0)"
    assert attempt.verdicts[0].endswith("requeued" if requeues else last)


def test_the_first_stop_is_always_followed_by_another_attempt(attempt: Attempt) -> None:
    assert attempt.run(restarts=0, MAX_RESTARTS="0") == 0
    assert attempt.requeues == 1


TERMINATED = "/usr/bin/sleep 0.2; kill -TERM $PPID; /usr/bin/sleep 0.2; exit 143"


@pytest.mark.parametrize("ends", ["", "N/A", "UNLIMITED", "NONE", "2126-01-01T00:00:00"])
def test_without_a_known_limit_a_sigterm_is_not_taken_for_it(attempt: Attempt, ends: str) -> None:
    attempt.run(TERMINATED, ENDS=ends)
    assert attempt.verdicts == ["1 step 0: stopped as asked (preemption or the time limit), requeued"]


@pytest.mark.parametrize(("restarts", "requeued"), [(1, "requeued"), (3, "not requeued: no new checkpoint after 3 restarts")])
def test_at_the_limit_it_is_requeued_at_once_as_long_as_it_comes_further(attempt: Attempt, restarts: int, requeued: str) -> None:
    attempt.run(TERMINATED, ENDS="2026-01-01T00:00:00", restarts=restarts)
    assert attempt.verdicts[0] == f"{restarts} step 0: time limit, before the ranks had ended; {requeued}"
    assert (attempt.requeues > 0) == (restarts == 1)


def test_a_controller_that_is_silent_for_a_moment_does_not_end_the_job(attempt: Attempt) -> None:
    attempt.run("exit 139", SILENT="2")
    assert attempt.asked.count("sleep 10") == 2
    assert (attempt.verdicts, attempt.requeues) == (["1 step 0: crash (exit code 139), requeued"], 1)


def test_setup_may_read_what_is_not_set(attempt: Attempt) -> None:
    attempt.saved(100)
    assert attempt.run(setup=('echo "[$NOT_SET]"', 'export SEEN="a b"')) == 0
    assert attempt.said.startswith("[]\n") and attempt.verdicts == ["1 step 100: finished"]
    config = recipes.get("tiny")
    text = render(SlurmJob(recipe="tiny", config=config, flags=(), command="c", nodes=1, setup=("module load cuda",)))
    assert "\nset +u\nmodule load cuda\nset -u\n" in text
    assert "set +u" not in render(SlurmJob(recipe="tiny", config=config, flags=(), command="c", nodes=1))


def test_paths_reach_the_ranks_as_they_are(attempt: Attempt) -> None:
    given = {"MANIFEST": 'a "b" $c.csv', "WEIGHTS": "it's", "ENCODERS": "a  b", "RUN": "`id`"}
    attempt.run(RUN_DIR=attempt.run_dir.name, CDPATH=str(attempt.folder), **given)
    words = (attempt.folder / "asked.srun").read_text().split("\0")
    values = {flag: value for flag, value in zip(words, words[1:], strict=False) if flag.startswith("--")}
    assert values["--run_dir"] == str(attempt.run_dir)
    assert [values[f"--{name}"] for name in ("data.manifest", "init.weights", "init.run", "encoders.t5")] == [
        given["MANIFEST"], given["WEIGHTS"], given["RUN"], "a  b/t5-v1_1-xxl",
    ]  # fmt: skip

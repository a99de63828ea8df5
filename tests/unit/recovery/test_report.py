"""What `megasora doctor --run` says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megasora import cli
from megasora.recovery.report import Report, examine, report_lines
from megasora.recovery.sentry import Sentry


def incarnation(run_dir: Path, number: int, *, last_step: int, error: Exception | None = None) -> None:
    """A start that makes steps, and may fail in the one after."""
    try:
        with Sentry(run_dir, rank=0, world_size=1, incarnation=number, limits=None) as sentry:
            for step in range(1, last_step + 1):
                sentry.beat(step, "forward_backward")
            if error is not None:
                sentry.batch([f"clip{k}" for k in range(10)])
                sentry.beat(last_step + 1, "data")
                raise error
    except ValueError:
        pass


def said(report: Report) -> str:
    return "\n".join(report_lines(report, run_dir=Path("runs/x")))


def test_a_death_is_explained_in_a_few_lines(tmp_path: Path) -> None:
    incarnation(tmp_path, 1, last_step=7, error=ValueError("the clip is broken"))
    report = examine(tmp_path, saved_step=4)
    text = said(report)
    assert "incarnation 1 died of an exception" in text
    assert "data of step 8: ValueError: the clip is broken" in text
    assert "clips of the step: clip0, clip1, clip2, clip3, clip4, clip5, clip6, clip7 and 2 more" in text
    assert "saved: step 4; 3 step(s) are made again" in text
    assert "next: the same command goes on from the checkpoint" in text
    assert len(text.splitlines()) < 10


def test_the_same_death_twice_is_no_accident(tmp_path: Path) -> None:
    for number in (1, 2):
        incarnation(tmp_path, number, last_step=7, error=ValueError("the clip is broken"))
    assert "incarnation(s) 1 ended in the same step in the same way: a restart will not help" in said(examine(tmp_path, saved_step=4))


def test_a_run_that_finished_tells_what_it_lived_through(tmp_path: Path) -> None:
    incarnation(tmp_path, 1, last_step=3, error=ValueError("the clip is broken"))
    incarnation(tmp_path, 2, last_step=9)
    text = said(examine(tmp_path, saved_step=9))
    assert text.startswith("incarnation 2 finished")
    assert "earlier: incarnation 1 died of an exception" in text
    assert "goodput: " in text and "in 2 incarnation(s)" in text


def test_a_run_that_never_began_is_said_so(tmp_path: Path) -> None:
    assert "no rank has left a record" in said(examine(tmp_path, saved_step=None))


def test_the_command_prints_it_for_people_and_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    incarnation(tmp_path, 1, last_step=2, error=ValueError("the clip is broken"))
    cli.main(["doctor", "--run", str(tmp_path)])
    assert "first cause: rank 0" in capsys.readouterr().out
    cli.main(["doctor", "--run", str(tmp_path), "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["cause"]["what"] == "ValueError: the clip is broken"
    assert data["goodput"]["incarnations"] == 1
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--run", str(tmp_path / "none")])
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["supervise"], "supervise needs the command to keep going: megasora supervise -- train RECIPE"),
        (["supervise", "--", "sample", "tiny"], "supervise needs the command to keep going"),
        (["supervise", "--", "train", "tiny", "--train.stepz", "3"], "no flag --train.stepz; did you mean --train.steps?"),
        (["supervise", "--", "train"], "train needs a recipe or a config.yaml"),
    ],
)
def test_a_command_that_cannot_be_kept_going_is_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert says in capsys.readouterr().err

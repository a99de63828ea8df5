"""Files that cannot be written: what a run can do without costs a line, a run's folder ends all ranks alike."""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megasora import cli, recipes
from megasora.config.schema import ParallelConfig, ProfileConfig, RunConfig
from megasora.training import events
from megasora.training.autoencoder.run import train_autoencoder
from megasora.training.first_rank import save_config
from megasora.training.run import train
from tests.parallel.runs import metrics, tiny_run, train_on_rank
from tests.pool import RankFailedError, RankPool


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """A folder that nobody can make."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "folder"


def train_with_a_full_disk(rank: int, config: RunConfig) -> str:
    """What the rank says on stderr; no sample clip of rank 1 can be written."""
    real: Callable[..., None] = events.write_video

    def write(path: Path, video: Tensor, **settings: Any) -> None:
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, video, **settings)

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(events, "write_video", write)
        train_on_rank(rank, config)
    return said.getvalue()


def test_a_sample_or_a_trace_that_cannot_be_written_does_not_end_the_run(pool: RankPool, nowhere: Path, tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "run", steps=2, parallel=ParallelConfig())
    config = replace(
        config,
        profile=ProfileConfig(steps="1:1", folder=str(nowhere)),
        evaluation=replace(config.evaluation, sample_interval_steps=2, sample_prompts=("a", "b")),
        sample=replace(config.sample, steps=1),
    )
    first, second = pool.run(2, train_with_a_full_disk, config)
    happened = [event for record in metrics(tmp_path / "run") for event in record["events"]]
    (sample,) = [event for event in happened if event["event"] == "sample"]
    assert sample["files"] == [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["step_00000002_00.mp4"]
    assert sample["failed"] == [{"file": "step_00000002_01.mp4", "reason": "No space left on device"}]
    assert sample["said"] in first
    (trace,) = [event for event in happened if event["event"] == "profile"]
    assert trace["said"] in first
    for rank, said in enumerate((first, second)):
        assert said.count(f"rank {rank}'s trace {nowhere}/rank_{rank:05d}.json.gz cannot be written (Not a directory)") == 1


def train_either(rank: int, run_dir: Path, autoencoder: bool) -> None:
    if autoencoder:
        train_autoencoder(replace(recipes.get_autoencoder("tiny_ae"), run_dir=str(run_dir), device="cpu"))
    else:
        train(tiny_run(run_dir, steps=1, parallel=ParallelConfig()))


@pytest.mark.parametrize("autoencoder", [False, True], ids=["train", "train-ae"])
def test_a_run_folder_that_cannot_be_made_ends_all_ranks_alike(pool: RankPool, nowhere: Path, autoencoder: bool) -> None:
    with pytest.raises(RankFailedError) as failed:
        pool.run(2, train_either, nowhere, autoencoder)
    said = f"UserError: {nowhere} cannot be written: Not a directory; mend it or choose another --run_dir"
    assert str(failed.value).count(said) == 2


def save_on_rank(rank: int, run_dir: Path) -> None:
    save_config(recipes.get("tiny"), run_dir)


def test_settings_that_cannot_be_written_end_all_ranks_alike(pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "config.yaml" / "not empty").mkdir(parents=True)
    with pytest.raises(RankFailedError) as failed:
        pool.run(2, save_on_rank, tmp_path)
    assert str(failed.value).count(f"UserError: {tmp_path} cannot be written: Is a directory; mend it") == 2


def command_on_rank(rank: int, words: list[str]) -> tuple[object, str]:
    """Exit code and stderr of a command."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        cli.main(words)
    return end.value.code, said.getvalue()


@pytest.mark.parametrize("words", [["train", "tiny"], ["train-ae", "tiny_ae"]], ids=["train", "train-ae"])
def test_the_command_says_it_in_one_line(pool: RankPool, nowhere: Path, words: list[str]) -> None:
    ((code, said),) = pool.run(1, command_on_rank, [*words, "--run_dir", str(nowhere), "--device", "cpu"])
    assert code == 2
    assert said == f"megasora: error: {nowhere} cannot be written: Not a directory; mend it or choose another --run_dir\n"

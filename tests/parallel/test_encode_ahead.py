"""A thread that encodes ahead changes when work is done and nothing else."""

from __future__ import annotations

import itertools
import shutil
import threading
from pathlib import Path

import pytest
from torch import Tensor

from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.models.autoencoders.autoencoder import Autoencoder
from megasora.models.autoencoders.posterior import Posterior
from megasora.training.run import train
from tests.parallel.runs import metrics, tiny_run, train_on_rank
from tests.parallel.test_parity import layout
from tests.pool import RankFailedError, RankPool


def test_encoding_ahead_changes_no_bit(pool: RankPool, tmp_path: Path) -> None:
    """Two replicas of two ranks that deal their clips out, and a clip that fails: the same losses, norms and skips."""
    first = tiny_run(tmp_path / "first", steps=1, parallel=layout())
    pool.run(1, train_on_rank, first)  # makes the clips
    broken = tmp_path / "first" / "assets" / "clips" / "clip005.mp4"
    broken.write_bytes(broken.read_bytes()[:600])
    curves = []
    for ahead in (False, True):
        run_dir = tmp_path / f"ahead {ahead}"
        shutil.copytree(tmp_path / "first" / "assets", run_dir / "assets")
        pool.run(4, train_on_rank, tiny_run(run_dir, steps=6, parallel=layout(cp=2), data={"encode_ahead": ahead}))
        records = metrics(run_dir)
        skips = [event["clip"] for record in records for event in record["events"] if event["event"] == "skip"]
        curves.append(([(record["loss"], record["grad_norm"], record["samples"]) for record in records], skips))
    assert curves[0] == curves[1]
    assert len(curves[0][0]) == 6
    assert set(curves[0][1]) == {"5"}


def encode_or_fail(rank: int, config: RunConfig) -> None:
    """A run whose third clip finds no memory for the autoencoder."""
    real = Autoencoder.posterior
    calls = itertools.count()

    def posterior(vae: Autoencoder, video: Tensor) -> Posterior:
        if next(calls) == 2:
            raise UserError(f"no memory for the autoencoder in {threading.current_thread().name}")
        return real(vae, video)

    Autoencoder.posterior = posterior  # type: ignore[method-assign]
    try:
        train(config)
    finally:
        Autoencoder.posterior = real  # type: ignore[method-assign]
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_an_error_of_the_thread_ends_the_run_with_its_own_message(pool: RankPool, tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "run", steps=6, parallel=layout(), data={"encode_ahead": True})
    with pytest.raises(RankFailedError, match="UserError: no memory for the autoencoder in ahead_0"):
        pool.run(1, encode_or_fail, config)

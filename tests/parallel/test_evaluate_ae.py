"""`megasora evaluate ae` of a trained checkpoint, on one rank and on several that share out the clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megasora.checkpoint import store
from megasora.checkpoint.autoencoder import open_autoencoder
from megasora.checkpoint.autoencoder_export import export_autoencoder
from megasora.cli.commands.evaluate import ae
from megasora.data.tiny_clips import make_tiny_clips
from tests.parallel.test_train_ae import small, train_on_rank
from tests.pool import RankPool

STEPS = 2


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_tiny_clips(tmp_path_factory.mktemp("clips") / "made", num_clips=4, num_eval=2)


@pytest.fixture(scope="module")
def checkpoint(pool: RankPool, clips: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    pool.run(1, train_on_rank, small(run_dir, clips, steps=STEPS, batch_size=1))
    return store.step_folder(run_dir / "checkpoints", STEPS)


def evaluate_on_rank(rank: int, weights: list[str], clips: str, out: str, select: Any) -> None:
    """The command on one rank of a pool."""
    arguments: dict[str, Any] = {"clips": Path(clips), "out": Path(out), "sizes": "16", "frames": "1,8", "limit": 3, "device": "cpu"}
    ae.run(ae.Args(weights=tuple(map(Path, weights)), select=select, **arguments))


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_several_ranks_find_what_one_finds_of_a_checkpoints_average(
    pool: RankPool, clips: tuple[Path, Path], checkpoint: Path, tmp_path: Path
) -> None:
    export_autoencoder(open_autoencoder(checkpoint, select="ema"), tmp_path / "folder", target_format="dc-ae")
    pool.run(2, evaluate_on_rank, [str(checkpoint)], str(clips[0]), str(tmp_path / "2"), "ema")
    pool.run(1, evaluate_on_rank, [str(tmp_path / "folder"), str(checkpoint)], str(clips[0]), str(tmp_path / "1"), "model")
    alone, together = (results(tmp_path / ranks) for ranks in ("1", "2"))
    (average,), (folder, model) = together["autoencoders"], alone["autoencoders"]
    assert average["name"] == f"{checkpoint.name} (ema)"
    assert average["weights_sha256"] == folder["weights_sha256"] != model["weights_sha256"]
    assert average["latents"] == folder["latents"] != model["latents"]  # to the bit: merged in the clips' order
    timed = ("autoencoder", "encode_s", "decode_s", "warm")
    ours = [{key: value for key, value in clip.items() if key not in timed} for clip in together["clips"]]
    theirs = [
        {key: value for key, value in clip.items() if key not in timed} for clip in alone["clips"] if clip["autoencoder"] == folder["name"]
    ]
    assert ours == theirs and len(ours) == 3 * 2
    assert len(list((tmp_path / "1" / "clips").iterdir())) == 2 * len(ours)

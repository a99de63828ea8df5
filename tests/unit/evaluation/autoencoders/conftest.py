"""One evaluation that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.evaluation.autoencoders.known import evaluate, tiny, write_clips
from tests.unit.evaluation.autoencoders.test_frechet import Means, scripted
from tests.unit.evaluation.clips import noise, write_exact
from tests.unit.evaluation.test_lpips import write_weights


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two autoencoders, three whole clips, a broken and a short one, measured in everything there is."""
    root = tmp_path_factory.mktemp("evaluated")
    tiny(root / "one"), tiny(root / "two", seed=1)
    write_clips(root / "clips")
    (root / "clips" / "broken.mp4").write_bytes(b"no video")
    write_exact(root / "clips" / "short <b>.png", noise(1, 32, 32))
    write_weights(root / "lpips", "alex")
    features = scripted(root / "means.pt", Means())
    words = ["--clips", root / "clips", "--out", root / "out", "--sizes", "32", "--frames", "1,8", "--lpips", root / "lpips"]
    evaluate(root / "one", root / "two", *words, "--fid", features, "--fvd", features, code=1)
    return root

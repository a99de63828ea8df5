"""100 damaged files through probe, shots, score and the loader (benchmarks/fuzz_media.py runs thousands)."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest


@pytest.mark.slow
def test_100_damaged_files_cost_their_own_rows_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVT_LOG", "1")
    path = Path(__file__).parents[3] / "benchmarks" / "fuzz_media.py"
    spec = importlib.util.spec_from_file_location("fuzz_media", path)
    assert spec is not None and spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    made, fates = fuzz.run(tmp_path, count=100, timeout_s=20.0, first_seed=50_000)
    assert set(fates) == set(made) and len(made) == 100
    counts = Counter(fates.values())
    assert not any("timed out" in fate or "crashed" in fate for fate in counts), counts
    assert counts["reads to its end, loader takes it"] >= 10 and sum(n for fate, n in counts.items() if fate.startswith("broken")) >= 20
    # what score read to its end, the loader nearly always reads too: the tables do not promise what training cannot have
    assert counts["reads to its end, loader refuses it"] <= 2

"""Damaged media files through probe, shots, score and the loader: nothing may crash or hang, and every file must end in the tables.

    python benchmarks/fuzz_media.py [--count 2000] [--timeout_s 20]

Prints a table: per mutation, how many files were broken, damaged inside, or good enough for both the tables and the loader.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

from pyarrow import parquet

from megasora.curation.mutations import make_mutated, make_seed_clips
from megasora.curation.probe import run_probe
from megasora.curation.score import run_score
from megasora.curation.settings import Limits, ProbeSettings, ScoreSettings, ShotsSettings
from megasora.curation.shots import run_shots
from megasora.data.decoding.contract import DecodeRequest
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.loader import ClipLoader, Decoded


def run(folder: Path, *, count: int, timeout_s: float, first_seed: int = 0) -> tuple[dict[str, str], dict[str, str]]:
    """(name -> mutation, name -> what became of it).

    Raises:
        AssertionError: a file is missing in a table, or its reason is.
    """
    made = make_mutated(folder / "clips", make_seed_clips(folder / "seeds"), count=count, first_seed=first_seed)
    limits = Limits(timeout_s=timeout_s, memory_gb=2.0)
    scores = ("motion", "blur", "light", "jitter", "hashes")
    run_probe(folder / "clips", ProbeSettings(output=folder / "probe.parquet"), limits=limits)
    run_shots(folder / "probe.parquet", ShotsSettings(output=folder / "shots.parquet"), limits=limits)
    run_score(folder / "shots.parquet", ScoreSettings(output=folder / "score.parquet", scores=scores), limits=limits)
    probed = {Path(row["path"]).name: row for row in parquet.read_table(folder / "probe.parquet").to_pylist()}
    scored: dict[str, list[dict[str, object]]] = {}
    for row in parquet.read_table(folder / "score.parquet").to_pylist():
        scored.setdefault(Path(row["path"]).name, []).append(row)
    assert set(probed) == set(made) == set(scored), "every file must be in every table"
    loaded = load(folder / "clips", probed, timeout_s=timeout_s)
    fates: dict[str, str] = {}
    for name in made:
        reasons = [str(row["error"] or row["score_error"]) for row in scored[name] if row["error"] or row["score_error"]]
        fate = "broken" if probed[name]["error"] else "damaged inside" if reasons else "reads to its end"
        if any("took longer" in reason for reason in reasons):
            fate = "timed out"
        if any("ended the worker" in reason for reason in reasons):
            fate = "crashed its worker"
        fates[name] = f"{fate}, loader {'takes it' if loaded[name] == '' else 'refuses it'}"
    return made, fates


def load(folder: Path, probed: dict[str, dict[str, object]], *, timeout_s: float) -> dict[str, str]:
    """name -> reason of the loader ('' for a clip), asking for what the table says is there (16 frames for a broken file)."""

    def request(name: str) -> DecodeRequest:
        frames = int(str(probed[name]["num_frames"] or 16))
        return DecodeRequest(path=str(folder / name), start=0, stride=1, num_frames=min(48, frames), height=32, width=48)

    names = sorted(probed)
    loader = ClipLoader(iter([[request(name)] for name in names]), decoder=PyAVDecoder(), workers=2, ahead=4, timeout_s=timeout_s)
    results: list[Decoded] = [clip for step in loader for clip in step.clips]
    loader.close()
    return {name: str(clip) if isinstance(clip, Exception) else "" for name, clip in zip(names, results, strict=True)}


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--timeout_s", type=float, default=20.0)
    args = parser.parse_args()
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder greets every clip otherwise
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        made, fates = run(Path(folder), count=args.count, timeout_s=args.timeout_s)
        seconds = time.perf_counter() - started
    counts = Counter((made[name], fate) for name, fate in fates.items())
    kinds = sorted(set(fates.values()))
    print("| mutation | " + " | ".join(kinds) + " |")
    print("|---|" + "---|" * len(kinds))
    for mutation in sorted(set(made.values())):
        print(f"| {mutation} | " + " | ".join(str(counts[mutation, kind]) for kind in kinds) + " |")
    print("| all | " + " | ".join(str(sum(fate == kind for fate in fates.values())) for kind in kinds) + " |")
    print(f"\n{args.count} files in {seconds:.0f} s; the process that loads is still alive.")


if __name__ == "__main__":
    main()

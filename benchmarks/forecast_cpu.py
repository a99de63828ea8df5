"""Forecast against measurement on this computer: layouts of two small models on CPU ranks.

    python -m benchmarks.forecast_cpu [--output DIR] [--repeats 1] [--json]

For each model: two traced runs of one rank, which with `study calibrate` on 2 and on 4 ranks make the hardware profiles; then a study of
the layouts, each by runs of its own, whose step times the forecast has not seen. Reported: error of each, median error, Spearman's rank
correlation over the layouts; peak resident memory likewise. Ends with one JSON line. Needs a quiet machine: nothing else may use its cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from megasora.config.io import load_yaml
from megasora.perf.hardware import load_hardware
from megasora.scaling.study.predicted import predict

MODELS = {
    "tiny": {},
    "small": {
        "model.hidden_size": 256,
        "model.ffn_hidden_size": 1024,
        "model.axes_dim": [8, 12, 12],
        "model.num_double_blocks": 4,
        "model.num_single_blocks": 6,
    },
}
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    1: {"one": {}},
    2: {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "cp2": {"cp": 2}},
    4: {"dp4": {}, "tp2dp2": {"tp": 2}, "tp4": {"tp": 4}, "pp4": {"pp": 4}, "tp2pp2": {"tp": 2, "pp": 2}, "cp2pp2": {"cp": 2, "pp": 2}},
}
COMMON = {"device": "cpu", "data.global_tokens": 1600, "data.num_microbatches": 4, "data.frame_counts": [17, 9]}
STEPS, WARMUP = 14, 4
SMALL_PACKS = 14
"""Micro-batches of the second reference run: about a clip each, as on four data-parallel ranks."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layout."""

    model: str
    layout: str
    ranks: int
    measured_s: float
    forecast_s: float
    measured_bytes: float
    forecast_bytes: float

    @property
    def error(self) -> float:
        """Of the step time, relative."""
        return self.forecast_s / self.measured_s - 1


def run(words: list[str], *, ranks: int = 1) -> None:
    """A megasora command on some ranks of one thread each."""
    launch = [sys.executable, "-m", "megasora"]
    if ranks > 1:
        launch = ["torchrun", "--standalone", f"--nproc-per-node={ranks}", "-m", "megasora"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"megasora {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def flags(settings: dict[str, object]) -> list[str]:
    """Settings as words."""
    found: list[str] = []
    for name, value in settings.items():
        found += [f"--{name}", *([str(item) for item in value] if isinstance(value, list) else [str(value)])]
    return found


def calibrate(model: str, folder: Path) -> dict[int, Path]:
    """Ranks -> profile, from two traced runs of one rank, in large and in small packs, and the collectives of 2 and 4."""
    references = [folder / "reference", folder / "reference_small_packs"]
    for reference, packs in zip(references, (COMMON["data.num_microbatches"], SMALL_PACKS), strict=True):
        settings = {**COMMON, **MODELS[model], "data.num_microbatches": packs, "train.steps": STEPS, "profile.steps": "8:10"}
        settings |= {"evaluation.interval_steps": 0, "checkpoint.interval_steps": 0}
        run(["train", "tiny", "--run_dir", str(reference), "--checkpoint.no_save_last", *flags(settings)])
    profiles = {}
    for ranks in (2, 4):
        profiles[ranks] = folder / f"machine{ranks}.yaml"
        words = ["study", "calibrate", str(references[0] / "config.yaml"), "--device", "cpu", "--output", str(profiles[ranks])]
        run([*words, "--reference", *map(str, references)], ranks=ranks)
    return {1: profiles[2], **profiles}


def study(model: str, folder: Path, *, repeats: int) -> dict[str, dict[str, object]]:
    """Measure every layout; id -> point of results.json."""
    found: dict[str, dict[str, object]] = {}
    for ranks, layouts in LAYOUTS.items():
        grid = {
            "recipe": "tiny",
            "steps": STEPS,
            "warmup_steps": WARMUP,
            "repeats": repeats,
            "timeout_s": 300,
            "gpus": [ranks],
            "overrides": {**COMMON, **MODELS[model]},
            "layouts": layouts,
        }
        file = folder / f"grid{ranks}.yaml"
        file.write_text(yaml.safe_dump(grid))
        output = folder / f"study{ranks}"
        run(["study", "run", str(file), "--output", str(output), "--json"])
        for point in json.loads((output / "results.json").read_text())["points"]:
            found[point["layout"]] = {**point, "folder": str(output / "points" / point["id"] / "repeat_1" / "run")}
    return found


def compare(model: str, folder: Path, *, repeats: int) -> list[Row]:
    """All layouts of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    profiles = calibrate(model, folder)
    reference, rows = load_yaml(folder / "reference" / "config.yaml"), []
    for layout, point in study(model, folder, repeats=repeats).items():
        if point["status"] != "done":
            print(f"{model} {layout}: {point['status']} {point['reason']}", file=sys.stderr)
            continue
        ranks, metrics = int(str(point["gpus"])), point["metrics"]
        config = load_yaml(Path(str(point["folder"])) / "config.yaml")
        config = replace(config, data=replace(config.data, manifest=reference.data.manifest))  # the same clips, which outlive the points
        forecast = predict(config, world_size=ranks, hardware=load_hardware(str(profiles[ranks])))
        rows.append(
            Row(
                model=model,
                layout=layout,
                ranks=ranks,
                measured_s=metrics["step_time_s"]["median"],  # type: ignore[index]
                forecast_s=forecast.step_time_s,
                measured_bytes=metrics["peak_memory_bytes"]["median"],  # type: ignore[index]
                forecast_bytes=forecast.peak_memory_bytes,
            )
        )
    return rows


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation; ties do not occur among measured times."""
    places = [sorted(values).index for values in (first, second)]
    gaps = sum((places[0](one) - places[1](two)) ** 2 for one, two in zip(first, second, strict=True))
    return 1 - 6 * gaps / (len(first) * (len(first) ** 2 - 1))


def main() -> None:
    """Measure, forecast, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("forecast_cpu"))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    arguments = parser.parse_args()
    rows = [row for model in arguments.models for row in compare(model, arguments.output.absolute() / model, repeats=arguments.repeats)]
    errors = [abs(row.error) for row in rows]
    memory = [abs(row.forecast_bytes / row.measured_bytes - 1) for row in rows]
    summary = {
        "layouts": len(rows),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "spearman": spearman([row.measured_s for row in rows], [row.forecast_s for row in rows]),
        "median_memory_error": statistics.median(memory),
        "worst_memory_error": max(memory),
    }
    if not arguments.json:
        print("| model | layout | ranks | measured s | forecast s | error | measured GB | forecast GB |")
        print("|---|---|---|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row.model} | {row.layout} | {row.ranks} | {row.measured_s:.3f} | {row.forecast_s:.3f} | {row.error:+.0%} "
                f"| {row.measured_bytes / 1e9:.3f} | {row.forecast_bytes / 1e9:.3f} |"
            )
    print(json.dumps({**summary, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()

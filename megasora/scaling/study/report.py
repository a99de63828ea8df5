"""A study's results for people and programs: results.csv, results.md, TensorBoard and the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megasora.config.files import written_whole
from megasora.scaling.study.collect import METRICS
from megasora.scaling.study.efficiency import Efficiency, efficiencies
from megasora.scaling.study.facts import facts
from megasora.scaling.study.page import write_page
from megasora.scaling.study.results import PointResult, Results

HEADINGS = (
    "point",
    "TP PP VP CP DP",
    "step, s (quartiles; min to max)",
    "steps",
    "tokens/s",
    "strong",
    "weak",
    "TFLOP/s a rank",
    "MFU",
    "memory, GB",
)
SPREAD = ("min", "q1", "median", "q3", "max")


def write_report(results: Results, folder: Path) -> dict[str, Path]:
    """Write everything; returns what -> where. Files that are there are replaced.

    Args:
        results: of the study.
        folder: made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shares = efficiencies(results.points)
    files = {"csv": folder / "results.csv", "markdown": folder / "results.md", "page": folder / "report.html"}
    for what, text in (("csv", csv_of(results, shares)), ("markdown", markdown_of(results, shares))):
        with written_whole(files[what]) as temporary:
            temporary.write_text(text)
    write_page(results, shares, files["page"])
    files["tensorboard"] = folder / "tensorboard"
    write_tensorboard(results, shares, files["tensorboard"])
    return files


def csv_of(results: Results, shares: Sequence[Efficiency]) -> str:
    """A row a point; columns METRIC_min, _q1, _median, _q3, _max, predictions and parts of the traces."""
    parts = list(dict.fromkeys(name for point in results.points for name in (point.trace or {})))
    rows: list[dict[str, Any]] = []
    for point in results.points:
        row: dict[str, Any] = {"id": point.id, "size": point.size, "layout": point.layout, "gpus": point.gpus, **point.axes}
        row |= {"scaling": " ".join(point.scaling), "status": point.status, "reason": point.reason, "repeats": point.repeats}
        row["steps"] = point.metrics["step_time_s"].count if "step_time_s" in point.metrics else None
        for scaling in ("strong", "weak"):
            row[f"{scaling}_efficiency"] = share_of(shares, point, scaling)
        for name in METRICS:
            spread = point.metrics.get(name)
            row |= {f"{name}_{which}": None if spread is None else getattr(spread, which) for which in SPREAD}
        for name in ("step_time_s", "peak_memory_bytes"):
            row[f"predicted_{name}"] = (point.predicted or {}).get(name)
        row |= {f"trace_{name}_s": (point.trace or {}).get(name) for name in parts}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["id"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def share_of(shares: Sequence[Efficiency], point: PointResult, scaling: str) -> float | None:
    """A point's efficiency in one kind of scaling; None where it has none."""
    return next((entry.value for entry in shares if entry.point.id == point.id and entry.scaling == scaling), None)


def markdown_of(results: Results, shares: Sequence[Efficiency]) -> str:
    """The study in words and one table."""
    lines = [f"# {results.name}", "", *facts(results), "", "| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    for point in results.points:
        if point.metrics:
            lines.append(_markdown_row(point, shares))
    left = [point for point in results.points if point.reason]
    if left:
        lines += ["", "Points without figures, or with runs that failed:", "", *(f"- {p.id}: {p.status}: {p.reason}" for p in left)]
    lines += ["", ABOUT]
    return "\n".join(lines) + "\n"


ABOUT = (
    "Medians and quartiles are over the counted steps of all repeats. Efficiency is tokens/s a rank over that of the best layout on the "
    "fewest ranks of the same size and scaling."
)


def _markdown_row(point: PointResult, shares: Sequence[Efficiency]) -> str:
    time = point.metrics["step_time_s"]
    mfu, memory = point.median("mfu"), point.median("peak_memory_bytes") or 0.0
    spread = f"{time.median:.4g} ({time.q1:.4g} to {time.q3:.4g}; {time.min:.3g} to {time.max:.3g})"
    cells = [
        point.id,
        " ".join(str(size) for size in point.axes.values()),
        spread,
        str(time.count),
        f"{point.median('tokens_per_s') or 0:,.0f}",
        *("" if (share := share_of(shares, point, scaling)) is None else f"{share:.0%}" for scaling in ("strong", "weak")),
        f"{point.median('tflops_per_gpu') or 0:.3g}",
        "" if mfu is None else f"{mfu:.1%}",
        f"{memory / 1e9:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def write_tensorboard(results: Results, shares: Sequence[Efficiency], folder: Path) -> None:
    """Scalars over the number of ranks, a run for each size, layout and scaling; hparams of every measured point."""
    import shutil

    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    for scaling, size, layout in sorted({(kind, p.size, p.layout) for p in results.done for kind in p.scaling}):
        with SummaryWriter(str(folder / f"{scaling}_{size}_{layout}")) as writer:
            for point in results.done:
                if (point.size, point.layout) == (size, layout) and scaling in point.scaling:
                    _scalars(writer, point, share_of(shares, point, scaling))
    for point in results.done:
        metrics = {f"point/{name}": spread.median for name, spread in point.metrics.items()}
        axes = {name: size for name, size in point.axes.items() if size is not None}
        with SummaryWriter(str(folder / "points" / point.id)) as writer:
            writer.add_hparams({"layout": point.layout, "size": point.size, "ranks": point.gpus, **axes}, metrics, run_name=".")


def _scalars(writer: Any, point: PointResult, efficiency: float | None) -> None:
    for name, spread in point.metrics.items():
        writer.add_scalar(f"ranks/{name}", spread.median, point.gpus)
    if efficiency is not None:
        writer.add_scalar("ranks/efficiency", efficiency, point.gpus)

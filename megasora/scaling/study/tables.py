"""Results, comparisons and traces as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megasora.perf.hardware import Hardware
from megasora.scaling.study.calibrate.profile import Calibration
from megasora.scaling.study.compare import Comparison
from megasora.scaling.study.efficiency import efficiencies
from megasora.scaling.study.results import PointResult, Results
from megasora.scaling.study.trace.breakdown import COLUMNS, StepParts
from megasora.scaling.study.trace.summary import means

HEADINGS = {
    "compute": "compute",
    "tensor_parallel": "TP",
    "context_parallel": "CP",
    "pipeline": "PP",
    "bubble": "bubble",
    "data_parallel": "DP",
    "optimizer": "optimizer",
    "data": "data",
    "gaps": "gaps",
    "other": "other",
}
"""Short headings of a step's parts."""


def print_results(results: Results) -> None:
    """One row a point, those without figures with their reason."""
    table = Table(
        title=f"{results.name}: {len(results.done)} of {len(results.points)} points measured", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in ("point", "step, s", "quartiles", "tokens/s", "strong", "weak", "TFLOP/s", "GB"):
        left = heading == "point"
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    shares = {(entry.point.id, entry.scaling): f"{entry.value:.0%}" for entry in efficiencies(results.points)}
    for point in results.points:
        table.add_row(*_row(point, [shares.get((point.id, scaling), "") for scaling in ("strong", "weak")]))
    console = Console()
    console.print(table)
    console.print("tokens/s of all ranks; strong and weak: efficiency; TFLOP/s of a rank; GB: peak memory of rank 0", highlight=False)
    for point in results.points:
        if point.reason:
            console.print(f"{point.id}: {point.status}: {point.reason}", highlight=False, markup=False, soft_wrap=True)


def _row(point: PointResult, shares: Sequence[str]) -> list[str]:
    time = point.metrics.get("step_time_s")
    if time is None:
        return [point.id, point.status, *[""] * 6]
    return [
        point.id,
        f"{time.median:.3g}",
        f"{time.q1:.3g} {time.q3:.3g}",
        f"{point.median('tokens_per_s') or 0:,.0f}",
        *shares,
        f"{point.median('tflops_per_gpu') or 0:.3g}",
        f"{(point.median('peak_memory_bytes') or 0) / 1e9:.2f}",
    ]


def print_comparison(comparison: Comparison) -> None:
    """Changes of points, points of one study, what differs about them."""
    a, b = comparison.names
    table = Table(
        title=f"{a} and {b}; a change counts above {comparison.threshold:.0%} and above the spread", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in ("point", "metric", a, b, "change", "spread", ""):
        table.add_column(heading, justify="left" if heading in ("point", "metric", "") else "right", overflow="fold")
    for point in comparison.points:
        if not point.changes:
            table.add_row(point.id, "", *point.status, "", "", "worse" if point.worse else "")
        for change in point.changes:
            values = (f"{change.a:.4g}", f"{change.b:.4g}", f"{change.change:+.1%}", f"{change.spread:.1%}")
            table.add_row(point.id, change.metric, *values, "" if change.verdict == "same" else change.verdict)
    console = Console()
    console.print(table)
    for name, points in ((a, comparison.only_a), (b, comparison.only_b)):
        if points:
            console.print(f"only in {name}: {', '.join(points)}", highlight=False, markup=False)
    for name, (one, other) in comparison.differences.items():
        console.print(f"{name}: {one} | {other}", highlight=False, markup=False)
    worse = [point.id for point in comparison.points if point.worse]
    console.print(f"worse: {', '.join(worse)}" if worse else "no point is worse", highlight=False, markup=False)


def print_trace(rows: Sequence[StepParts]) -> None:
    """Milliseconds by part, a row for each step and rank, and the mean; parts that no row has are left out."""
    mean = means(rows)
    shown = [name for name in COLUMNS if mean[name] > 0]
    table = Table(title="milliseconds of a step by rank; communication where no compute covers it", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("step", "rank", "all", *(HEADINGS[name] for name in shown), "world"):
        table.add_column(heading, justify="right", no_wrap=True)

    def cells(seconds: float, parts: Mapping[str, float], world: float) -> list[str]:
        return [_milliseconds(value) for value in (seconds, *(parts[name] for name in shown), world)]

    for row in rows:
        table.add_row(str(row.step), str(row.rank), *cells(row.seconds, row.parts, row.exposed["world"]))
    table.add_section()
    table.add_row("mean", "", *cells(sum(mean.values()), mean, sum(row.exposed["world"] for row in rows) / len(rows)))
    Console().print(table)
    print("bubble holds world: waiting for all ranks to agree. megasora study trace --json has communication that compute covers, too")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.2g}"


def print_calibration(hardware: Hardware, found: Calibration) -> None:
    """Kernels and collectives as they were measured, and the link that was fitted to them."""
    table = Table(title=f"{hardware.name}: {hardware.rates.source}")
    for heading in ("what", "size", "rate", "median, ms", "min to max, ms"):
        table.add_column(heading, justify="left" if heading == "what" else "right", overflow="fold")
    for entry in found.kernels:
        unit = "launches/s" if entry.what == "launch" else "GB/s" if entry.what in ("memory", "Adam") else "GFLOP/s"
        rate = entry.rate if entry.what == "launch" else entry.rate / 1e9
        time = entry.time
        spread = f"{time.min_s * 1e3:.4g} to {time.max_s * 1e3:.4g}"
        table.add_row(entry.what, f"{entry.size:,.0f}" if entry.size else "", f"{rate:,.4g} {unit}", f"{time.median_s * 1e3:.4g}", spread)
    table.add_section()
    for moved in found.transfers:
        name, rate = moved.operation.replace("_", "-"), moved.sent_bytes / moved.seconds / 1e9
        table.add_row(name, f"{moved.payload_bytes:,}", f"{rate:.4g} GB/s", f"{moved.seconds * 1e3:.4g}", "")
    console = Console()
    console.print(table)
    link = hardware.links[0]
    console.print(f"link: {link.bytes_per_s / 1e9:.4g} GB/s, {link.latency_s * 1e6:.4g} us ({link.source})", highlight=False, markup=False)
    if found.losses:
        losses = ", ".join(f"{ranks:g}: {share:.0%}" for ranks, share in found.losses)
        console.print(f"ranks at work at once and the share of its rate that each keeps: {losses}", highlight=False, markup=False)

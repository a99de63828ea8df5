"""The page of a study: one HTML file with its plots, tables and style in it; nothing comes from a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from megasora.config.files import written_whole
from megasora.scaling.study import plots
from megasora.scaling.study.collect import METRICS
from megasora.scaling.study.efficiency import Efficiency
from megasora.scaling.study.facts import facts
from megasora.scaling.study.plots import Mark
from megasora.scaling.study.results import PointResult, Results
from megasora.scaling.study.trace.breakdown import COLUMNS

BODY, TITLE = "<!--BODY-->", "<!--TITLE-->"
"""Where the template takes the page's parts."""
SCALINGS = {"strong": "Strong scaling: the same step on more ranks", "weak": "Weak scaling: a step that grows with the ranks"}


def write_page(results: Results, shares: Sequence[Efficiency], path: Path) -> None:
    """Write the page; the file appears whole or not at all."""
    template = (files("megasora.scaling.study") / "page.html").read_text(encoding="utf-8")
    body = "\n".join([_head(results), *_figures(results, shares), _table(results, shares), _without(results), _setup(results)])
    with written_whole(path) as temporary:
        temporary.write_text(template.replace(TITLE, escape(results.name)).replace(BODY, body), encoding="utf-8")


def _head(results: Results) -> str:
    machine = results.machine
    where = (
        f"{len(machine['gpus'])} x {machine['gpus'][0]}" if machine.get("gpus") else f"{machine.get('cores')} cores, {machine.get('cpu')}"
    )
    done = results.done
    best = max(done, key=lambda point: (point.median("tokens_per_s") or 0.0) / point.gpus, default=None)
    figures = [(f"{len(done)} of {len(results.points)}", "points measured"), (str(max((p.gpus for p in done), default=0)), "ranks at most")]
    if best is not None:
        figures.append((f"{(best.median('tokens_per_s') or 0) / best.gpus:,.0f}", f"tokens/s a rank at best: {best.label}"))
    mfu = max((value for point in done if (value := point.median("mfu")) is not None), default=None)
    if mfu is not None:
        figures.append((f"{mfu:.1%}", "MFU at best"))
    cards = "".join(f"<div><b>{escape(value)}</b>{escape(what)}</div>" for value, what in figures)
    return (
        f'<h1>{escape(results.name)}</h1><p class="soft">{escape(where)}; {escape(results.created)}</p><div class="figures">{cards}</div>'
    )


def _figures(results: Results, shares: Sequence[Efficiency]) -> list[str]:
    found = []
    for scaling, heading in SCALINGS.items():
        entries = [entry for entry in shares if entry.scaling == scaling]
        if entries:
            found.append(f"<h2>{heading}</h2>")
            for size in dict.fromkeys(entry.point.size for entry in entries):
                found.append(_scaling([entry for entry in entries if entry.point.size == size], size))
    if any(point.trace for point in results.done):
        found.append(_traces(results.done))
    if any(point.predicted for point in results.done):
        found.append(_predictions(results.done))
    return found


def _scaling(entries: Sequence[Efficiency], size: str) -> str:
    """Throughput, efficiency, use of the hardware and memory of one size."""
    layouts = list(dict.fromkeys(entry.point.layout for entry in entries))
    has_mfu = any(entry.point.median("mfu") is not None for entry in entries)
    use = ("mfu", "MFU", True) if has_mfu else ("tflops_per_gpu", "TFLOP/s a rank", False)
    by_layout = {name: sorted((e for e in entries if e.point.layout == name), key=lambda e: e.point.gpus) for name in layouts}
    points = {name: [entry.point for entry in found] for name, found in by_layout.items()}
    shares = {
        name: [Mark(x=e.point.gpus, y=e.value, title=f"{e.point.label}: {e.value:.1%} of {e.reference.label}") for e in found]
        for name, found in by_layout.items()
    }
    memory = _series(points, "peak_memory_bytes", factor=1e-9)
    used = _series(points, use[0])
    drawn = [
        ("Throughput", plots.lines(_series(points, "tokens_per_s"), x_label="ranks", y_label="tokens/s")),
        ("Efficiency", plots.lines(shares, x_label="ranks", y_label="of the fewest ranks' best", ideal=1.0, percent=True)),
        *([(use[1], plots.lines(used, x_label="ranks", y_label=use[1], percent=use[2]))] if any(used.values()) else []),
        *([("Peak memory of rank 0", plots.lines(memory, x_label="ranks", y_label="GB"))] if any(memory.values()) else []),
    ]
    return f'<p class="soft">size {escape(size)}</p>{plots.legend(layouts)}<div class="grid2">{"".join(map(_figure, drawn))}</div>'


def _figure(drawn: tuple[str, str]) -> str:
    return f"<figure><figcaption>{escape(drawn[0])}</figcaption>{drawn[1]}</figure>"


def _series(points: dict[str, list[PointResult]], metric: str, *, factor: float = 1.0) -> dict[str, list[Mark]]:
    """Medians with quartiles as whiskers."""
    series: dict[str, list[Mark]] = {}
    for name, found in points.items():
        series[name] = []
        for point in found:
            if (spread := point.metrics.get(metric)) is not None:
                median, low, high = (value * factor for value in (spread.median, spread.q1, spread.q3))
                title = f"{point.label}: {median:,.4g}, half of the steps within {low:,.4g} and {high:,.4g}"
                series[name].append(Mark(x=point.gpus, y=median, low=low, high=high, title=title))
    return series


def _traces(points: Sequence[PointResult]) -> str:
    """Stacked parts of each traced point, with the predicted ones below where there are any."""
    rows: dict[str, dict[str, float]] = {}
    for point in points:
        if point.trace:
            rows[point.id] = point.trace
            if point.predicted:
                rows[f"{point.id} predicted"] = point.predicted["parts"]
    table = "".join(_shares_row(point.id, point.trace) for point in points if point.trace)
    return (
        "<h2>Where a step's time goes</h2><p class=soft>Means over traced steps and ranks. Communication counts where no compute covers "
        "it; bubble is waiting for other ranks. Tracing slows steps down, small ones most.</p>"
        f"{plots.legend([name.replace('_', ' ') for name in COLUMNS])}"
        f'<div class="grid2"><figure>{plots.bars(rows, names=COLUMNS, unit="ms", factor=1e3)}</figure>'
        "<figure><div class=scroll><table><tr><th>Share of the step</th><th class=n>communication</th><th class=n>bubble</th>"
        f"<th class=n>data</th><th class=n>gaps</th></tr>{table}</table></div></figure></div>"
    )


def _shares_row(name: str, trace: dict[str, float]) -> str:
    shares = (_communication(trace), *(_part(trace, part) for part in ("bubble", "data", "gaps")))
    return f"<tr><td>{escape(name)}</td>{''.join(f'<td class=n>{share:.0%}</td>' for share in shares)}</tr>"


def _communication(trace: dict[str, float]) -> float:
    return sum(_part(trace, name) for name in ("tensor_parallel", "context_parallel", "pipeline", "data_parallel"))


def _part(trace: dict[str, float], name: str) -> float:
    return trace.get(name, 0.0) / (sum(trace.values()) or 1.0)


def _predictions(points: Sequence[PointResult]) -> str:
    drawn = []
    for metric, words, factor in (("step_time_s", "step time, s", 1.0), ("peak_memory_bytes", "peak memory, GB", 1e-9)):
        series: dict[str, list[Mark]] = {}
        for point in points:
            measured = point.median(metric)
            if point.predicted and measured:
                x, y = point.predicted[metric] * factor, measured * factor
                title = f"{point.label}: predicted {x:.4g}, measured {y:.4g} ({y / x - 1:+.0%})"
                series.setdefault(point.layout, []).append(Mark(x=x, y=y, title=title))
        if series:
            drawn.append((words, plots.diagonal(series, x_label=f"predicted {words}", y_label=f"measured {words}")))
    names = list(dict.fromkeys(point.layout for point in points if point.predicted))
    return f'<h2>Predicted and measured</h2>{plots.legend(names)}<div class="grid2">{"".join(map(_figure, drawn))}</div>'


def _table(results: Results, shares: Sequence[Efficiency]) -> str:
    names = [name for name in METRICS if any(name in point.metrics for point in results.points)]
    head = "".join(f"<th class=n>{escape(METRICS[name].replace(', bytes', ', GB'))}</th>" for name in names)
    rows = []
    for point in results.points:
        if not point.metrics:
            continue
        axes = " ".join(f"{name.upper()}{size}" for name, size in point.axes.items() if size and size > 1)
        efficiency = ", ".join(f"{entry.scaling} {entry.value:.0%}" for entry in shares if entry.point.id == point.id)
        rows.append(
            f"<tr><td>{escape(point.id)}</td><td>{axes}</td><td class=n>{point.gpus}</td><td class=n>{efficiency}</td>"
            f"{''.join(_cell(point, name) for name in names)}</tr>"
        )
    return (
        "<h2>All points</h2><p class=soft>Medians over the counted steps of all repeats; hover for the spread.</p><div class=scroll><table>"
        f"<tr><th>Point</th><th>Layout</th><th class=n>Ranks</th><th class=n>Efficiency</th>{head}</tr>{''.join(rows)}</table></div>"
    )


def _cell(point: PointResult, name: str) -> str:
    spread = point.metrics.get(name)
    if spread is None:
        return "<td></td>"
    factor = 1e-9 if name.endswith("_bytes") else 1.0
    low, first, median, third, high = (value * factor for value in (spread.min, spread.q1, spread.median, spread.q3, spread.max))
    title = f"{spread.count} steps: {low:.4g} to {high:.4g}, quartiles {first:.4g} and {third:.4g}"
    text = f"{median:,.0f}" if abs(median) >= 1000 else f"{median:.1%}" if name == "mfu" else f"{median:.3g}"
    return f'<td class=n title="{escape(title)}">{text}</td>'


def _without(results: Results) -> str:
    rows = "".join(
        f"<tr><td>{escape(p.id)}</td><td>{escape(p.status.replace('_', ' '))}</td><td>{escape(p.reason)}</td></tr>"
        for p in results.points
        if p.reason
    )
    if not rows:
        return ""
    return (
        f"<h2>Points without figures, or with runs that failed</h2><table><tr><th>Point</th><th>What</th><th>Reason</th></tr>{rows}</table>"
    )


def _setup(results: Results) -> str:
    rows = "".join(f"<li>{escape(fact.removeprefix('- ').replace('`', ''))}</li>" for fact in facts(results))
    commands = "\n".join(f"{point.id}\n    {point.command}" for point in results.points if point.command)
    details = f"<details><summary>The command of every point</summary><pre>{escape(commands)}</pre></details>"
    return f"<h2>How it was measured</h2><ul>{rows}</ul>{details}"

"""The comparison on a terminal, and as a csv file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megasora.config.files import written_whole
from megasora.data.cache.layout import readable_bytes
from megasora.evaluation.autoencoders.published import Published
from megasora.evaluation.autoencoders.summary import About, Distance, Results, Row
from megasora.evaluation.intervals import Summary

HEADINGS = ("autoencoder", "TxHxW", "clips", "PSNR, dB", "SSIM", "LPIPS", "FID", "FVD", "encode", "decode", "memory", "FLOPs")
"""Memory and operations are of encoding / decoding."""
COSTS = HEADINGS.index("encode")
"""From here on a column is a cost."""


def lines_of(results: Results) -> tuple[list[int], list[tuple[str, ...]], list[tuple[str, ...]]]:
    """(numbers of the headings that have any text, texts of the measured rows, texts of the published ones); all texts are there."""
    rows = [(row.subject, *_cells(row)) for row in results.rows]
    published = [
        (f"{about.subject.name}, published", *_published(about.published)) for about in results.about if about.published is not None
    ]
    used = [number for number in range(len(HEADINGS)) if any(texts[number] for texts in (*rows, *published))]
    return used, rows, published


def _cells(row: Row) -> tuple[str, ...]:
    psnr = "equal" if row.psnr is None else with_error(row.psnr, digits=2)
    measures = (psnr, with_error(row.ssim, digits=4), "" if row.lpips is None else with_error(row.lpips, digits=4))
    ways = row.encode, row.decode
    costs = (
        *(seconds(way.seconds.median) for way in ways),
        " / ".join(readable_bytes(way.counted_bytes if way.measured_bytes is None else way.measured_bytes) for way in ways),
        " / ".join(operations(way.flops) for way in ways),
    )
    return str(row.shape), str(row.clips), *measures, distance(row.fid), distance(row.fvd), *costs


def _published(row: Published) -> tuple[str, ...]:
    return "not stated", "", f"{row.psnr:.3f}", f"{row.ssim:.3f}", f"{row.lpips:.3f}", *[""] * 6


def with_error(summary: Summary, *, digits: int) -> str:
    """Mean and its standard error."""
    error = summary.standard_error
    return f"{summary.mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def distance(found: Distance | None) -> str:
    """A Frechet distance; a star where the covariances are not whole."""
    return "" if found is None else f"{found.value:.3f}{'*' if found.samples <= found.dims else ''}"


def operations(flops: int) -> str:
    """'26.2 T'."""
    unit, name = next(((unit, name) for unit, name in ((1e12, "T"), (1e9, "G")) if flops >= unit), (1e6, "M"))
    return f"{flops / unit:.3g} {name}"


def seconds(value: float) -> str:
    """Milliseconds below a second."""
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def scale_line(about: About) -> str:
    """What a diffusion transformer's latents are to be multiplied by, in words."""
    assert about.latents is not None
    kept, given = about.latents.statistics, about.subject.facts.scaling_factor
    if not kept.std > 0:
        return f"{about.subject.name}: all latents are {kept.mean:.4g}, there is no scaling factor"
    return (
        f"{about.subject.name}: latents have mean {kept.mean:.4g} and deviation {kept.std:.4g}; scaling_factor {kept.scaling_factor:.5g} "
        f"(multiplies; 1/{kept.scaling_factor:.5g} = {kept.std:.5g} divides), its configuration says {given:.5g}"
    )


def render(results: Results) -> None:
    """Print the table, the scales and what was skipped; a terminal that is too narrow gets quality and cost apart."""
    console = Console()
    used, rows, published = lines_of(results)
    lines = [*((texts, None) for texts in rows), *((texts, "dim") for texts in published)]
    whole = _table(used, lines)
    if console.measure(whole, options=console.options.update(max_width=1000)).maximum <= console.width:
        console.print(whole)
    else:
        measured = [line for line in lines if line[1] is None]
        console.print(_table([number for number in used if number < COSTS], lines))
        console.print(_table([number for number in used if number < 2 or number >= COSTS], measured))
    for line in (*(scale_line(about) for about in results.about if about.latents is not None), *notes(results)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in results.skipped:
        console.print(f"skipped {line}", highlight=False, markup=False, soft_wrap=True)


def _table(numbers: Sequence[int], lines: Sequence[tuple[tuple[str, ...], str | None]]) -> Table:
    """Some columns of (texts, style)."""
    table = Table(*(HEADINGS[number] for number in numbers))
    for texts, style in lines:
        table.add_row(*(escape(texts[number]) for number in numbers), style=style)
    return table


def notes(results: Results) -> list[str]:
    """What a reader has to know of the figures."""
    found = ["± is the standard error over clips; times are medians of clips, the first of each shape left out; memory beside the weights"]
    if all(row.encode.measured_bytes is None for row in results.rows):
        found.append("memory is counted on tensors without data: a CPU's allocator keeps no record")
    if results.evaluation.lpips is not None:
        found.append(
            f"LPIPS: {results.evaluation.lpips}, spatial mean" + (" (published: alex)" if results.evaluation.lpips != "alex" else "")
        )
    if equal := sum(row.equal_clips for row in results.rows):
        found.append(f"{equal} reconstructions equal in every frame: infinite PSNR, not in the mean")
    if any(one is not None and one.samples <= one.dims for row in results.rows for one in (row.fid, row.fvd)):
        found.append("* no more samples than features: too high, compare with equal numbers of samples only")
    return [*found, *(f"not measured: {line}" for line in results.evaluation.left_out)]


def write_csv(results: Results, path: Path) -> None:
    """One row per clip, shape and autoencoder; an infinite PSNR is empty."""
    names = ("autoencoder", "shape", "clip", "psnr", "equal_frames", "ssim", "lpips", "encode_s", "decode_s", "warm", "cell")
    with written_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(results.as_dict()["clips"])

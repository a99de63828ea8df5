"""The page of a comparison: one HTML file with its pictures, plots and style in it; nothing comes from a network, nothing runs."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from megasora.evaluation.autoencoders import plots
from megasora.evaluation.autoencoders.cells import Cell
from megasora.evaluation.autoencoders.pictures import AMPLIFIED, shown_frames
from megasora.evaluation.autoencoders.settings import Shape
from megasora.evaluation.autoencoders.summary import About, Results
from megasora.evaluation.autoencoders.table import HEADINGS, lines_of, notes, scale_line

BODY, TITLE = "<!--BODY-->", "<!--TITLE-->"
"""Where the template takes the page's parts."""
COLOURS = 6
NUMBERS = frozenset(HEADINGS[2:])
"""Columns that stand to the right."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One clip at one shape, with what each autoencoder made of it."""

    name: str
    shape: Shape
    cells: dict[str, Cell]
    """By autoencoder."""

    @property
    def psnr(self) -> float:
        """Mean over the autoencoders."""
        return sum(cell.measures.psnr for cell in self.cells.values()) / len(self.cells)


def page_of(results: Results) -> str:
    """The whole page."""
    names = [about.subject.name for about in results.about]
    title = f"Autoencoders: {', '.join(names)}"
    template = (files("megasora.evaluation.autoencoders") / "page.html").read_text(encoding="utf-8")
    parts = [_head(results, title), _table(results), *_clips(results), *map(_latents, results.about), _skipped(results), _how(results)]
    return template.replace(TITLE, escape(title)).replace(BODY, "\n".join(parts))


def _head(results: Results, title: str) -> str:
    settings = results.evaluation.settings
    figures = []
    for about in results.about:
        rows = [row for row in results.rows if row.subject == about.subject.name and row.psnr is not None]
        best = max((row.psnr.mean for row in rows if row.psnr is not None), default=None)
        facts = about.subject.facts
        what = (
            f"{facts.temporal_compression}x{facts.spatial_compression}x{facts.spatial_compression}, {facts.latent_channels} channels, "
            f"{'causal' if facts.causal else 'not causal'}, {about.parameters / 1e6:.1f} M parameters, {about.values_per_latent:g} numbers "
            "to one"
        )
        value = "" if best is None else f"{best:.2f} dB at best: "
        figures.append(f"<div><b>{escape(about.subject.name)}</b>{escape(value + what)}</div>")
    where = f"{settings.clips}; {results.evaluation.device}, {settings.dtype}, tiling: {settings.cutting}"
    return f'<h1>{escape(title)}</h1><p class="soft">{escape(where)}</p><div class="figures">{"".join(figures)}</div>'


def _table(results: Results) -> str:
    used, rows, published = lines_of(results)
    head = "".join(f"<th{_side(number)}>{escape(HEADINGS[number])}</th>" for number in used)
    lines = [_line(texts, used) for texts in rows] + [_line(texts, used, kind="published") for texts in published]
    mark = ""
    if published:
        mark = (
            '<p class="soft">Published: arXiv 2503.09642, table 1, for an autoencoder of these sizes; which clips, which size and whether '
            "in tiles is not stated, so the rows are not of one measurement.</p>"
        )
    said = "".join(f"<li>{escape(note)}</li>" for note in notes(results))
    return (
        f'<h2>Comparison</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        f'{mark}<ul class="soft">{said}</ul>'
    )


def _line(texts: Sequence[str], used: Sequence[int], *, kind: str = "") -> str:
    cells = "".join(f"<td{_side(number)}>{escape(texts[number])}</td>" for number in used)
    return f'<tr class="{kind}">{cells}</tr>'


def _side(number: int) -> str:
    return ' class="n"' if HEADINGS[number] in NUMBERS else ""


def _clips(results: Results) -> list[str]:
    """For each shape the worst and the best clips."""
    found = []
    for shape in dict.fromkeys(group.shape for group in results.evaluation.groups):
        shown = _of_shape(results, shape)
        count = min(results.evaluation.settings.shown, len(shown))
        worst = (count + 1) // 2
        parts = [("Worst", shown[:worst]), ("Best", shown[len(shown) - (count - worst) :])]
        for which, clips in parts:
            if clips:
                found.append(f"<h2>{which} of {len(shown)} at {escape(shape.words)}</h2>")
                found += [_clip(clip, list(results.about)) for clip in clips]
    return found


def _of_shape(results: Results, shape: Shape) -> list[Shown]:
    """Clips of a shape, the worst first; where PSNR is equal (or infinite) in their order."""
    cells: dict[str, dict[str, Cell]] = {}
    for group in results.evaluation.groups:
        if group.shape == shape:
            for clip, cell in group.cells:
                cells.setdefault(clip.name, {})[group.subject.name] = cell
    return sorted((Shown(name=name, shape=shape, cells=found) for name, found in cells.items()), key=lambda shown: shown.psnr)


def _clip(shown: Shown, about: Sequence[About]) -> str:
    colours = {one.subject.name: number % COLOURS for number, one in enumerate(about)}
    figures = []
    for frame in shown_frames(shown.shape.num_frames):
        figures.append(_figure(next(iter(shown.cells.values())).folder / f"original_{frame}.webp", f"frame {frame + 1}, the clip"))
        for name, cell in shown.cells.items():
            psnr = cell.measures.psnr_frames[frame]
            figures.append(_figure(cell.folder / f"made_{frame}.webp", f"{name}: {_decibels(math.inf if psnr is None else psnr)}"))
            figures.append(_figure(cell.folder / f"difference_{frame}.webp", f"{name}: difference x {AMPLIFIED}"))
    columns = 1 + 2 * len(shown.cells)
    rows = "".join(f'<div class="row" style="--columns: {columns}">{"".join(group)}</div>' for group in _grouped(figures, columns))
    measures = "; ".join(
        f'<i class="c{colours[name]}"></i>{escape(name)}: {_decibels(cell.measures.psnr)}, SSIM {cell.measures.ssim:.4f}'
        + ("" if cell.measures.lpips is None else f", LPIPS {cell.measures.lpips:.4f}")
        for name, cell in shown.cells.items()
    )
    strips = "".join(
        f'<figure class="strip">{_picture(cell.folder / "strip.webp", f"{name} over time")}<figcaption>{escape(name)} over time: the clip, '
        f"what came back, difference x {AMPLIFIED}</figcaption></figure>"
        for name, cell in shown.cells.items()
        if shown.shape.num_frames > 1
    )
    curve = plots.curves({name: cell.measures.psnr_frames for name, cell in shown.cells.items()}, colours=colours)
    return (
        f'<section><h3>{escape(shown.name)}</h3><p class="soft">{measures}</p><div class="scroll">{rows}</div>'
        + (f'<div class="time"><div class="scroll">{strips}</div>{curve}</div>' if strips else "")
        + "</section>"
    )


def _grouped(figures: Sequence[str], columns: int) -> list[Sequence[str]]:
    return [figures[start : start + columns] for start in range(0, len(figures), columns)]


def _decibels(psnr: float) -> str:
    return "equal (infinite PSNR)" if math.isinf(psnr) else f"{psnr:.2f} dB"


def _figure(path: Path, caption: str) -> str:
    return f"<figure>{_picture(path, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def _picture(path: Path, words: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(words)}" src="data:image/webp;base64,{data}">'


def _latents(about: About) -> str:
    if about.latents is None:
        return ""
    moments, kept = about.latents.moments, about.latents.statistics
    facts = (
        f"{kept.values:,} numbers in each of {len(kept.latents_std)} channels, from {kept.clips} clips at {', '.join(kept.shapes)}. Not "
        "scaled; of draws from the posterior where it has a spread, histograms of its means. Each spans four deviations to both sides."
    )
    return (
        f"<h2>Latents of {escape(about.subject.name)}</h2><p>{escape(scale_line(about))}.</p>"
        f'<p class="soft">{escape(facts)}</p>'
        f'<figure class="wide">{plots.channels(kept.latents_mean, kept.latents_std)}<figcaption>Mean (dot) and deviation (bar) of each '
        f'channel</figcaption></figure><div class="tiles">{"".join(plots.histograms(moments))}</div>'
    )


def _skipped(results: Results) -> str:
    if not results.skipped:
        return ""
    return f"<h2>Skipped</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in results.skipped)}</ul>"


def _how(results: Results) -> str:
    evaluation = results.evaluation
    ranks = f"{evaluation.ranks} rank{'s' if evaluation.ranks > 1 else ''}"
    rate = "every frame" if evaluation.settings.fps is None else f"at most {evaluation.settings.fps:g} frames a second"
    said = [
        "All pictures are compared as 8-bit levels; what is decoded is the mean of the encoder's posterior.",
        "PSNR: levels on [0, 1], of each frame's mean squared error, mean over frames, then over clips.",
        "SSIM: Gaussian window of 11 pixels and deviation 1.5, only where it lies inside, each colour by itself, mean over frames.",
        f"Clips were decoded by {evaluation.decoder}, {rate}.",
        f"Times are of one clip after the other on {ranks}, without decoding of files.",
        *(f"{about.subject.name}: {about.subject.path}, weights {about.subject.sha256[:16]}" for about in results.about),
    ]
    return f"<h2>How it was measured</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in said)}</ul>"

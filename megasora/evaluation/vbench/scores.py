"""Reads VBench's result files and computes its normalised, group and total scores. A score that lacks a dimension is not computed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megasora.config.errors import UserError
from megasora.evaluation.vbench.dimensions import BY_NAME, DIMENSIONS, GROUP_WEIGHTS
from megasora.evaluation.vbench.published import PUBLISHED, Published

ENDING = "_eval_results.json"
"""vbench/__init__.py, `evaluate`."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One dimension as VBench wrote it."""

    score: float
    """In [0, 1]."""
    clips: int
    """Clips it was measured on."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one model; a group is None while one of its dimensions is missing, the total while a group is."""

    results: Mapping[str, Result]
    normalised: Mapping[str, float]
    quality: float | None
    semantic: float | None
    total: float | None

    @property
    def missing(self) -> tuple[str, ...]:
        """Dimensions without a result."""
        return tuple(dimension.name for dimension in DIMENSIONS if dimension.name not in self.results)


def result_files(paths: Sequence[Path]) -> list[Path]:
    """Result files among files and folders.

    Raises:
        UserError: a path is missing, or a folder has none.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.rglob(f"*{ENDING}"))
            if not inside:
                raise UserError(f"{path} holds no file that ends in {ENDING}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"no VBench results at {path}")
    return list(dict.fromkeys(found))


def read_results(files: Sequence[Path]) -> dict[str, Result]:
    """Dimensions of all files.

    Raises:
        UserError: not VBench's format, an unknown dimension, a score outside [0, 1], or a dimension with two different scores.
    """
    results: dict[str, Result] = {}
    origin: dict[str, Path] = {}
    for path in files:
        for name, result in _read(path).items():
            if name in results and results[name] != result:
                raise UserError(f"{origin[name]} and {path} disagree about {name}; give one of them")
            results[name], origin[name] = result, path
    return results


def _read(path: Path) -> dict[str, Result]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(held, dict) or not held:
            raise ValueError("no table of dimensions")
        found = {str(name): _result(entry) for name, entry in held.items()}
    except (OSError, ValueError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"{path} is no VBench result file, {{dimension: [score, clips]}} ({error})") from error
    for name, result in found.items():
        if name not in BY_NAME:
            raise UserError(f"{path}: {name} is no dimension of VBench's text to video; there are {', '.join(BY_NAME)}")
        if not 0.0 <= result.score <= 1.0:
            raise UserError(f"{path}: {name} is {result.score:g}; VBench writes scores in [0, 1]")
    return found


def _result(entry: Any) -> Result:
    if not isinstance(entry, list) or isinstance(entry[0], bool) or not isinstance(entry[0], (int, float)) or not math.isfinite(entry[0]):
        raise ValueError("an entry is no list that begins with a score")
    clips = entry[1] if len(entry) > 1 else []
    return Result(score=float(entry[0]), clips=len(clips) if isinstance(clips, list) else 0)


def scores_of(results: Mapping[str, Result]) -> Scores:
    """Normalised scores, the weighted mean of each group, and the total (4 quality + semantic) / 5."""
    normalised = {
        dimension.name: dimension.normalised(results[dimension.name].score) for dimension in DIMENSIONS if dimension.name in results
    }
    groups: dict[str, float | None] = {}
    for group in GROUP_WEIGHTS:
        members = [dimension for dimension in DIMENSIONS if dimension.group == group]
        if any(dimension.name not in normalised for dimension in members):
            groups[group] = None
            continue
        total_weight = sum(dimension.weight for dimension in members)
        groups[group] = sum(dimension.weight * normalised[dimension.name] for dimension in members) / total_weight
    quality, semantic = groups["quality"], groups["semantic"]
    total = None
    if quality is not None and semantic is not None:
        total = (GROUP_WEIGHTS["quality"] * quality + GROUP_WEIGHTS["semantic"] * semantic) / sum(GROUP_WEIGHTS.values())
    return Scores(results=dict(results), normalised=normalised, quality=quality, semantic=semantic, total=total)


def as_dict(scores: Scores) -> dict[str, Any]:
    """For JSON: everything in [0, 1], published models' numbers in percent as their sources print them."""
    dimensions = {
        name: {"score": result.score, "normalised": scores.normalised[name], "clips": result.clips}
        for name, result in scores.results.items()
    }
    return {
        "dimensions": dimensions,
        "quality": scores.quality,
        "semantic": scores.semantic,
        "total": scores.total,
        "missing": list(scores.missing),
        "published": [asdict(model) for model in PUBLISHED],
    }


def render(scores: Scores) -> None:
    """Print the scores in percent beside the published ones."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="VBench, percent")
    table.add_column("dimension", no_wrap=True, min_width=max(len(dimension.name) for dimension in DIMENSIONS))
    for heading in ("score", "normalised", *(model.model for model in PUBLISHED)):
        table.add_column(heading, justify="right")
    for dimension in DIMENSIONS:
        result = scores.results.get(dimension.name)
        own = (_percent(result.score), _percent(scores.normalised[dimension.name])) if result else ("-", "-")
        table.add_row(dimension.name, *own, *(_found(model, dimension.name) for model in PUBLISHED))
    table.add_section()
    for name in ("quality", "semantic", "total"):
        table.add_row(name, "", _percent(getattr(scores, name)), *(_found(model, name) for model in PUBLISHED))
    console = Console()
    console.print(table)
    for model in PUBLISHED:
        console.print(f"{model.model}: {model.source}", highlight=False, soft_wrap=True)
    if scores.missing:
        console.print(
            f"not measured: {', '.join(scores.missing)}; a group's score needs all of its dimensions", highlight=False, soft_wrap=True
        )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _found(model: Published, name: str) -> str:
    value = model.scores.get(name)
    return "-" if value is None else f"{value:.2f}"

"""The file results.json of a study: everything that reports and comparisons read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megasora.config.errors import UserError
from megasora.config.files import written_whole
from megasora.config.io import from_dict
from megasora.scaling.study.collect import Spread

FORMAT = "megasora.study/1"
FILE = "results.json"


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """What is known of a point."""

    id: str
    layout: str
    size: str
    gpus: int
    scaling: tuple[str, ...]
    axes: dict
    """tp, pp, vp, cp, dp; dp is null where the ranks do not divide."""
    status: str
    """done where at least one repeat is; else that of the first."""
    reason: str = ""
    repeats: int = 0
    """Runs that count."""
    command: str = ""
    metrics: dict = field(default_factory=dict)
    """Name -> `Spread`."""
    predicted: dict | None = None
    """`Predicted`: step_time_s, peak_memory_bytes, communication_bytes, parts."""
    trace: dict | None = None
    """Seconds by part of a step: means over the traced steps and ranks."""

    def median(self, name: str) -> float | None:
        """Median of a metric; None where it was not measured."""
        found: Spread | None = self.metrics.get(name)
        return None if found is None else found.median

    @property
    def label(self) -> str:
        """Layout and ranks, for people."""
        return f"{self.layout} on {self.gpus}"


@dataclass(frozen=True, kw_only=True)
class Results:
    """A study."""

    name: str
    created: str
    """Date and time of the newest collection, local."""
    command: str
    machine: dict
    versions: dict
    commit: str | None
    grid: dict
    points: tuple[PointResult, ...]
    format: str = FORMAT

    @property
    def done(self) -> list[PointResult]:
        """Points with figures."""
        return [point for point in self.points if point.status == "done"]


def write_results(results: Results, folder: Path) -> Path:
    """Write results.json; the file appears whole or not at all."""
    with written_whole(folder / FILE) as temporary:
        temporary.write_text(json.dumps(asdict(results), indent=1) + "\n")
    return folder / FILE


def read_results(path: Path) -> Results:
    """A study's results, by its folder or by the file.

    Raises:
        UserError: there are none, or the file is not one.
    """
    file = path / FILE if path.is_dir() else path
    try:
        data = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give a folder that `megasora study run` wrote") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{file} is not a study of format {FORMAT}; measure it again with this version")
    results: Results = from_dict(data, Results, path=file.name)
    for point in results.points:
        for name, values in point.metrics.items():
            point.metrics[name] = _spread(values, f"{file.name}: {point.id}.{name}")
    return results


def _spread(values: Any, path: str) -> Spread:
    found: Spread = from_dict(values, Spread, path=path)
    return found

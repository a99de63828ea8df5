"""Two studies point by point: which changes are larger than the threshold and than what steps differ by anyway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megasora.scaling.study.collect import Spread
from megasora.scaling.study.results import PointResult, Results

BETTER: dict[str, Literal["less", "more"]] = {"step_time_s": "less", "tokens_per_s": "more", "peak_memory_bytes": "less"}
"""Metrics that are compared, and which way is better."""
Verdict = Literal["same", "better", "worse"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One metric of a point in both studies."""

    metric: str
    a: float
    """Median."""
    b: float
    change: float
    """b / a - 1."""
    spread: float
    """The larger of both (q3 - q1) / median."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class PointChange:
    """A point that both studies have."""

    id: str
    status: tuple[str, str]
    """In a, in b."""
    changes: tuple[Change, ...]
    """Empty unless both measured it."""

    @property
    def worse(self) -> bool:
        """Whether the gate closes: a metric got worse, or what ran does not run any more."""
        return any(change.verdict == "worse" for change in self.changes) or (self.status[0] == "done" and self.status[1] != "done")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two studies."""

    names: tuple[str, str]
    threshold: float
    points: tuple[PointChange, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    differences: Mapping[str, tuple[Any, Any]]
    """Machine, versions, commit and grid settings that differ: (in a, in b)."""

    @property
    def regressed(self) -> bool:
        """Whether any point got worse."""
        return any(point.worse for point in self.points)


def compare_studies(a: Results, b: Results, *, threshold: float) -> Comparison:
    """Points by their id.

    Args:
        a: before.
        b: after.
        threshold: smallest relative change that counts.
    """
    before, after = ({point.id: point for point in results.points} for results in (a, b))
    return Comparison(
        names=(a.name, b.name),
        threshold=threshold,
        points=tuple(_point(point, after[name], threshold) for name, point in before.items() if name in after),
        only_a=tuple(name for name in before if name not in after),
        only_b=tuple(name for name in after if name not in before),
        differences=_differences(a, b),
    )


def _point(a: PointResult, b: PointResult, threshold: float) -> PointChange:
    changes = [
        change_of(name, a.metrics[name], b.metrics[name], threshold=threshold) for name in BETTER if name in a.metrics and name in b.metrics
    ]
    return PointChange(id=a.id, status=(a.status, b.status), changes=tuple(changes))


def change_of(metric: str, a: Spread, b: Spread, *, threshold: float) -> Change:
    """The change of a median, and whether it counts: it must exceed both the threshold and the spread."""
    change = b.median / a.median - 1 if a.median else 0.0
    spread = max(a.relative, b.relative)
    verdict: Verdict = "same"
    if abs(change) > max(threshold, spread):
        verdict = "better" if (change < 0) == (BETTER[metric] == "less") else "worse"
    return Change(metric=metric, a=a.median, b=b.median, change=change, spread=spread, verdict=verdict)


def _differences(a: Results, b: Results) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for part, one, other in (
        ("machine", a.machine, b.machine),
        ("versions", a.versions, b.versions),
        ("grid", a.grid, b.grid),
        ("", {"commit": a.commit}, {"commit": b.commit}),
    ):
        for name in dict.fromkeys([*one, *other]):
            if one.get(name) != other.get(name):
                found[f"{part}.{name}".removeprefix(".")] = (one.get(name), other.get(name))
    return found


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """For programs."""
    return {**asdict(comparison), "regressed": comparison.regressed}

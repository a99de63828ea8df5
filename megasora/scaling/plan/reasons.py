"""Why a layout is not among the best: ruled out by a setting, by memory, or slower, and by what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megasora.config.memory import MemoryEstimate
from megasora.scaling.forecast.cost import StepParts
from megasora.scaling.plan.space import Layout


@dataclass(frozen=True, kw_only=True)
class RuledOut:
    """A class of layouts that cannot work, and the one constraint that says so."""

    layouts: str
    """What they have in common: "TP1 PP1 CP1", or the values of one setting."""
    count: int
    constraint: str
    """Name of the setting, or "memory"."""
    reason: str


class Sieve:
    """Gathers what was ruled out, by class."""

    def __init__(self) -> None:
        self._settings: dict[tuple[str, str], list[Layout]] = {}
        self._refused: set[Layout] = set()
        self._memory: list[RuledOut] = []

    def setting(self, layout: Layout, name: str, reason: str) -> None:
        """A layout that the settings refuse."""
        self._settings.setdefault((name, reason), []).append(layout)
        self._refused.add(layout)

    def refused(self, layout: Layout) -> bool:
        """Whether the settings refuse it."""
        return layout in self._refused

    def memory(self, layouts: Sequence[Layout], *, needs: MemoryEstimate, by: Layout, room: float) -> None:
        """Layouts of one TP, PP, CP and format, none of which fits; `by` needs least of them."""
        name, most = next(iter(needs.parts().items()))
        reason = (
            f"{by.name} needs least of them, {needs.total / 1e9:.0f} GB ({name.replace('_', ' ')} {most / 1e9:.0f}); "
            f"{room / 1e9:.0f} GB are there"
        )
        label = f"TP{by.tp} PP{by.pp} CP{by.cp}" + ("" if by.fp8 == "none" else f" FP8 {by.fp8}")
        self._memory.append(RuledOut(layouts=label, count=len(layouts), constraint="memory", reason=reason))

    def found(self) -> tuple[RuledOut, ...]:
        """Every class; what the settings refuse first, the largest first."""
        out = [
            RuledOut(layouts=_common(layouts), count=len(layouts), constraint=name, reason=reason)
            for (name, reason), layouts in self._settings.items()
        ]
        return tuple(sorted([*out, *self._memory], key=lambda one: (one.constraint == "memory", -one.count, one.layouts)))


def _common(layouts: list[Layout]) -> str:
    """The values that all of them share, those that the whole space does not."""
    shared = []
    for name, label in (("tp", "TP"), ("pp", "PP"), ("vp", "VP"), ("cp", "CP"), ("zero", "ZeRO"), ("fp8", "FP8 ")):
        values = sorted({getattr(layout, name) for layout in layouts})
        if len(values) == 1 and values[0] not in ("none",) and not (name in ("vp",) and values[0] == 1):
            shared.append(f"{label}{values[0]}")
    return " ".join(shared) or "several"


def why_slower(parts: StepParts, best: StepParts, *, least: float = 0.005) -> str:
    """What a layout loses against the best one, and what it wins back: "+0.42 s bubble, -0.10 s compute"; "as fast" below half a percent.

    Args:
        parts: of the layout.
        best: of the best.
        least: share of the best step below which a category is not told.
    """
    changes = [(getattr(parts, field.name) - getattr(best, field.name), field.name.replace("_", " ")) for field in fields(StepParts)]
    told = [f"{change:+.3g} s {name}" for change, name in sorted(changes, key=lambda one: -abs(one[0])) if abs(change) > least * best.total]
    return ", ".join(told) or "as fast"

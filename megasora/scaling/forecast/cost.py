"""Seconds by what they are spent on; the categories are those of a measured trace (`study trace`)."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of one rank."""

    compute: float = 0.0
    """Kernels of the model."""
    gaps: float = 0.0
    """The device waits for the host to launch kernels."""
    tensor_parallel: float = 0.0
    """Collectives over TP; nothing of ours runs beside them."""
    context_parallel: float = 0.0
    """Exchanges over CP that nothing hides."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            compute=self.compute + other.compute,
            gaps=self.gaps + other.gaps,
            tensor_parallel=self.tensor_parallel + other.tensor_parallel,
            context_parallel=self.context_parallel + other.context_parallel,
        )

    def __mul__(self, factor: float) -> Cost:
        return Cost(
            compute=self.compute * factor,
            gaps=self.gaps * factor,
            tensor_parallel=self.tensor_parallel * factor,
            context_parallel=self.context_parallel * factor,
        )

    @property
    def total(self) -> float:
        """Of all categories."""
        return self.compute + self.gaps + self.tensor_parallel + self.context_parallel


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """Seconds of a step on its slowest rank, by category; they add up to the step."""

    compute: float = 0.0
    gaps: float = 0.0
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0
    pipeline: float = 0.0
    """Messages between stages that nothing hides."""
    bubble: float = 0.0
    """Waiting for other stages."""
    data_parallel: float = 0.0
    """Gradients and weights over DP x CP that nothing hides."""
    optimizer: float = 0.0
    data: float = 0.0
    """Encoders, and waiting for clips."""

    @property
    def total(self) -> float:
        """The step."""
        return sum(float(getattr(self, field.name)) for field in fields(self))

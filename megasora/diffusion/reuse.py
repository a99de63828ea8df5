"""Reuse between steps: where the velocity changes little, the next one is extrapolated from the last two instead of evaluated.

A cache of the kind of TeaCache (arXiv 2411.19108) and first-block caches, which reuse what the last step computed until an accumulated
estimate of its change passes a threshold. Here the estimate is the velocity's own relative change per time between the last two evaluated
steps, so it asks nothing of the model, costs one sum over the ranks, and works in every layout. What is skipped is a whole evaluation of
every branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megasora.diffusion.guidance import Branch, VelocityFunction

FIRST_STEPS = 3
"""Steps that are always evaluated: two for the first estimate, and one to check it."""


class StepReuse:
    """A velocity function that evaluates `inner` only where it must.

    Args:
        inner: the model on this rank's tokens.
        threshold: accumulated relative change after which the model is asked again; 0.05 skips about every second step in the middle.
        sum_over_ranks: makes fp64 [2] the same on all ranks of the clip: sums over those that share out tokens.

    The last step is not known here; its error is scaled by its short time step like any other.
    """

    def __init__(self, inner: VelocityFunction, *, threshold: float, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        self.inner, self.threshold, self.sum_over_ranks = inner, threshold, sum_over_ranks
        self.asked = 0
        """Calls."""
        self.evaluated = 0
        """Calls that asked the model."""
        self._known: list[tuple[float, list[Tensor]]] = []
        """(t, velocities) of the last two evaluated steps, older first."""
        self._rate = 0.0
        """Relative change per time between them."""

    def __call__(self, x: Tensor, t: float, branches: Sequence[Branch]) -> list[Tensor]:
        """Velocities at tokens x and time t, evaluated or extrapolated."""
        self.asked += 1
        if self.asked > FIRST_STEPS and self._rate * (self._known[-1][0] - t) < self.threshold:
            (before, old), (at, new) = self._known
            share = (t - at) / (at - before)
            return [b + share * (b - a) for a, b in zip(old, new, strict=True)]
        velocities = self.inner(x, t, branches)
        self.evaluated += 1
        self._known = [*self._known[-1:], (t, velocities)]
        if len(self._known) == 2:
            self._rate = self._change_per_time()
        return velocities

    def _change_per_time(self) -> float:
        (before, old), (at, new) = self._known
        squares = [[(b - a).double().square().sum(), b.double().square().sum()] for a, b in zip(old, new, strict=True)]
        change, size = self.sum_over_ranks(torch.stack([torch.stack(pair) for pair in squares]).sum(0)).sqrt().tolist()
        return float(change / max(size, 1e-30) / (before - at))

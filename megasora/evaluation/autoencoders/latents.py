"""Moments and histograms of latents, clip after clip: merged in a fixed order, so they do not depend on who measured which clip.

Moments are of a draw from the posterior: its variance is that of the means plus the mean of its own variances.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megasora.models.autoencoders.posterior import Posterior

Array = NDArray[np.float64]
BIN, LAST, WIDTH = 0.05, 11.0, 0.1
"""Bins are equal in asinh(value / WIDTH), from -LAST to LAST: 0.005 wide at 0, 5 % of a value far from it, and as far as +-3,000."""
EDGES: Array = WIDTH * np.sinh(np.arange(-LAST, LAST + BIN / 2, BIN))
NUM_BINS = len(EDGES) - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentMoments:
    """Of each channel."""

    count: int
    mean: Array
    """[C]"""
    squares: Array
    """[C], sums of squared deviations from the mean."""
    histogram: NDArray[np.int64]
    """[C, NUM_BINS] of the posterior's means; what lies beyond is in the outermost bins."""

    @property
    def std(self) -> Array:
        """[C], over n."""
        return np.sqrt(self.squares / self.count)

    @property
    def over_channels(self) -> tuple[float, float]:
        """(mean, std over n) of all channels together."""
        centre = float(self.mean.mean())
        within, between = self.squares.sum() / self.count, ((self.mean - centre) ** 2).sum()
        return centre, float(np.sqrt((within + between) / len(self.mean)))

    def merged(self, other: LatentMoments) -> LatentMoments:
        """Of both together (Chan, Golub and LeVeque 1983, The American Statistician 37, 242: equation 2.1)."""
        count, step = self.count + other.count, other.mean - self.mean
        return LatentMoments(
            count=count,
            mean=self.mean + step * (other.count / count),
            squares=self.squares + other.squares + step**2 * (self.count * other.count / count),
            histogram=self.histogram + other.histogram,
        )

    def arrays(self) -> dict[str, NDArray]:
        """As a file keeps them."""
        return {"count": np.array(self.count), "mean": self.mean, "squares": self.squares, "histogram": self.histogram.astype(np.int32)}

    @classmethod
    def of_arrays(cls, arrays: dict[str, NDArray]) -> LatentMoments:
        """From a file."""
        histogram = arrays["histogram"].astype(np.int64)
        return cls(count=int(arrays["count"]), mean=arrays["mean"], squares=arrays["squares"], histogram=histogram)


def moments_of(posterior: Posterior) -> LatentMoments:
    """Of one clip, in fp64."""
    values = posterior.mean.double().flatten(1)
    mean = values.mean(dim=1)
    squares = (values - mean[:, None]).pow(2).sum(dim=1) + posterior.std.double().pow(2).flatten(1).sum(dim=1)
    edges = torch.from_numpy(EDGES[1:-1]).to(values.device)
    places = torch.bucketize(values, edges)
    channels = torch.arange(len(values), device=values.device)[:, None] * NUM_BINS
    counts = torch.bincount((places + channels).flatten(), minlength=len(values) * NUM_BINS)
    return LatentMoments(
        count=values.shape[1],
        mean=mean.cpu().numpy(),
        squares=squares.cpu().numpy(),
        histogram=counts.view(len(values), NUM_BINS).cpu().numpy(),
    )


def merged(parts: Iterable[LatentMoments]) -> LatentMoments | None:
    """Of all parts, in their order; None for none."""
    whole: LatentMoments | None = None
    for part in parts:
        whole = part if whole is None else whole.merged(part)
    return whole

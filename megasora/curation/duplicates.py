"""Near-duplicate clips by the PDQ hashes of their frames, and which one of each group stays.

Two clips are near-duplicates when most frames of the one with fewer hashes are within the distance of some frame of the other. Groups are
what such pairs connect. Hashes of flat pictures (black, one colour) say nothing and are ignored; so are hashes that more clips share than
a scene plausibly would (a channel's title card): they would glue strangers together.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

HASH_BITS = 256
MAX_SHARED = 64
"""A hash with more matches in other clips than this is ignored (chosen: a clip uploaded more often is rare, a title card is not)."""
_FLAT_BITS = 0.25
"""PDQ sets half of its bits by construction; a hash further from half than this share of the bits is of a flat picture."""
_EXACT_BELOW = 60_000
"""Hashes up to which every pair is compared. Above, pairs that agree in one of 16 bands of 16 bits are: that finds all pairs up to 15 bits
apart and nearly 9 of 10 frames at 31 bits, of which most must match. Looking one flip further finds the rest in 14 times the time."""


def duplicate_of(
    hashes: NDArray[np.uint8], lengths: NDArray[np.int64], rank: NDArray[np.float64], *, bits: int, exact: bool | None = None
) -> NDArray[np.int64]:
    """For every clip the clip of its group that stays; itself when it stays.

    Args:
        hashes: uint8 [frames, 32], the frames of all clips one after another.
        lengths: how many of them each clip has; 0 for a clip without.
        rank: one number per clip; the highest of a group stays, the first of equals.
        bits: largest distance of frames that match.
        exact: compare all pairs (slow, for the test); None decides by the number of hashes.

    Returns:
        int64 [clips].
    """
    count = len(lengths)
    if count == 0:
        return np.zeros(0, np.int64)
    owner = np.repeat(np.arange(count), lengths)
    useful = np.abs(np.bitwise_count(hashes).sum(1, dtype=np.int64) - HASH_BITS // 2) <= _FLAT_BITS * HASH_BITS
    owner, flat = owner[useful], np.ascontiguousarray(hashes[useful])
    a, b = _matches(flat, owner, bits=bits, exact=len(flat) <= _EXACT_BELOW if exact is None else exact)
    pairs = _pairs_with_a_majority(a, b, owner, count)
    labels = _components(pairs, count)
    return _best(labels, rank)


def _matches(flat: NDArray[np.uint8], owner: NDArray[np.int64], *, bits: int, exact: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(i, j) of hashes of different clips that are within `bits`, both ways round; hashes with too many matches left out."""
    if not len(flat):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    index: Any = faiss.IndexBinaryFlat(HASH_BITS) if exact else faiss.IndexBinaryMultiHash(HASH_BITS, 16, 16)
    index.add(flat)
    limits, _, found = index.range_search(flat, bits + 1)  # faiss finds what is strictly nearer
    bounds: NDArray[np.int64] = np.asarray(limits, np.int64)
    i = np.repeat(np.arange(len(flat)), bounds[1:] - bounds[:-1])
    j = found.astype(np.int64)
    apart = owner[i] != owner[j]
    i, j = i[apart], j[apart]
    # the multi-hash index gives a hash once for each band that agrees
    code = np.unique(i * len(flat) + j)
    i, j = code // len(flat), code % len(flat)
    crowded = np.bincount(i, minlength=len(flat)) > MAX_SHARED
    quiet = ~(crowded[i] | crowded[j])
    return i[quiet], j[quiet]


def _pairs_with_a_majority(i: NDArray[np.int64], j: NDArray[np.int64], owner: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """[pairs, 2] of clips (a < b) of which the one with fewer useful hashes has a match for more than half of them."""
    if not len(i):
        return np.zeros((0, 2), np.int64)
    frames = np.bincount(owner, minlength=count)
    # a frame counts once for each other clip, however many of that clip's frames it matches
    code = np.unique(i * count + owner[j])
    mine, other = owner[code // count], code % count
    pair, matched = np.unique(mine * count + other, return_counts=True)
    mine, other = pair // count, pair % count
    counted = (frames[mine] < frames[other]) | ((frames[mine] == frames[other]) & (mine < other))
    enough = counted & (2 * matched > frames[mine])
    return np.stack([mine[enough], other[enough]], axis=1)


def _components(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Label of every clip: the smallest number it is connected with. Labels spread over pairs and jump to their own label."""
    labels = np.arange(count)
    while True:
        before = labels.copy()
        smallest = np.minimum(labels[pairs[:, 0]], labels[pairs[:, 1]])
        for side in (0, 1):
            np.minimum.at(labels, pairs[:, side], smallest)
            np.minimum.at(labels, before[pairs[:, side]], smallest)
        labels = labels[labels]
        if np.array_equal(labels, before):
            return labels


def _best(labels: NDArray[np.int64], rank: NDArray[np.float64]) -> NDArray[np.int64]:
    order = np.lexsort((np.arange(len(labels)), -rank, labels))
    first = np.r_[True, labels[order][1:] != labels[order][:-1]]
    best = np.zeros(len(labels), np.int64)
    best[labels[order][first]] = order[first]
    return best[labels]

"""Counter-based randomness: every element of every draw is a function of a key and its element number, never of a rank.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer torch ops, so that CPU and GPU give the
same bits and any slice can be drawn alone. Keys name what is drawn: (seed, epoch, sample, step, stream).
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
"""Round multipliers and key increments of Philox4x32 (Random123, philox.h)."""
_CHUNK = 1 << 20


class Stream(IntEnum):
    """What a key is for; two streams never share a draw."""

    NOISE = 1
    TIMESTEP = 2
    DROPOUT_T5 = 3
    DROPOUT_CLIP = 4
    CONDITION = 5
    INIT = 6
    VAE = 7
    SAMPLE = 8
    EVAL = 9
    START = 10
    IMAGE = 11
    PATCHES = 12
    INTERVAL = 13


def _mix(state: int, value: int) -> int:
    """splitmix64 finaliser of state + value (Steele et al., OOPSLA 2014): every bit of both reaches every bit of the result."""
    z = (state + (value + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


def key_of(*, seed: int, stream: Stream, epoch: int = 0, sample: int = 0, step: int = 0) -> int:
    """64-bit key of a draw; each field is mixed in turn, so order and value of all of them matter."""
    state = 0
    for value in (seed, int(stream), epoch, sample, step):
        state = _mix(state, value & 0xFFFFFFFFFFFFFFFF)
    return state


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], *, key: int, rounds: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 block function on int64 tensors that hold unsigned 32-bit words.

    Args:
        counter: four words per block, broadcastable.
        key: 64-bit key, low word first.
        rounds: 10 is the published choice.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32
    for _ in range(rounds):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _words(block: Tensor, *, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    zero = torch.zeros_like(block)
    return philox4x32((block & _MASK, (block >> 32) & _MASK, zero, zero), key=key)


def uniform_at(index: Tensor, *, key: int) -> Tensor:
    """fp64 uniforms in (0, 1), one per int64 element number: 53 bits of the element's own block."""
    high, low, _, _ = _words(index, key=key)
    return (((high << 21) | (low >> 11)).double() + 0.5) * 2.0**-53


def normal_at(index: Tensor, *, key: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals, one per int64 element number, in the shape of `index`.

    Elements 2 i and 2 i + 1 are the two Box-Muller values of block i, computed in fp64 and rounded once.
    Drawn in pieces of 2^20 elements, so that memory stays bounded.
    """
    flat = index.reshape(-1)
    out = torch.empty(flat.shape, dtype=dtype, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        a, b, c, d = _words(part >> 1, key=key)
        radius = torch.sqrt(-2 * torch.log(((a << 21) | (b >> 11)).double().add_(0.5).mul_(2.0**-53)))
        angle = ((c << 21) | (d >> 11)).double().mul_(2.0 * math.pi * 2.0**-53)
        # sin(x) = cos(x - pi / 2): one transcendental serves both values of a block
        angle -= (part & 1).double().mul_(0.5 * math.pi)
        out[start : start + len(part)] = radius.mul_(angle.cos_())
    return out.view(index.shape)


def uniform(*, key: int, element: int = 0) -> float:
    """One uniform in (0, 1) as a Python float."""
    return float(uniform_at(torch.tensor([element]), key=key))


def normal(*, key: int, element: int = 0) -> float:
    """One standard normal as a Python float (fp64)."""
    return float(normal_at(torch.tensor([element]), key=key, dtype=torch.float64))

"""What a layer of an autoencoder knows beyond the tensor that it is given: a whole clip's layers know everything, a slab's ask other ranks.

Layers are handed one of these with their input, so that they never know about ranks.
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

Lengths = tuple[int, int, int]


class Surroundings(Protocol):
    """Four questions, of time, height and width in this order."""

    def reached(self, x: Float[Tensor, "B C T H W"], *, kernel: Lengths, stride: Lengths) -> tuple[Float[Tensor, "B C U I J"], Lengths]:
        """x with what a convolution (odd kernel, as many zeros as it reaches) reads beyond it, and the zeros to add on each axis still."""
        ...

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all places of the clip, from sums over the places of x."""
        ...

    def num_frames(self, x: Float[Tensor, "B C T H W"]) -> int:
        """Frames of the whole clip at the layer whose input x is."""
        ...

    def place(self, x: Float[Tensor, "B C T H W"]) -> tuple[Lengths, Lengths]:
        """(frame, row, column at which x begins in the clip; frames, rows, columns of the clip) at the layer whose tensor x is."""
        ...


class Whole:
    """The tensor is the whole clip."""

    def reached(self, x: Tensor, *, kernel: Lengths, stride: Lengths) -> tuple[Tensor, Lengths]:
        """See `Surroundings.reached`."""
        return x, (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)

    def total(self, sums: Tensor) -> Tensor:
        """See `Surroundings.total`."""
        return sums

    def num_frames(self, x: Tensor) -> int:
        """See `Surroundings.num_frames`."""
        return x.shape[2]

    def place(self, x: Tensor) -> tuple[Lengths, Lengths]:
        """See `Surroundings.place`."""
        return (0, 0, 0), (x.shape[2], x.shape[3], x.shape[4])


WHOLE = Whole()

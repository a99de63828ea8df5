"""How a rank's parameter maps onto the canonical (unsharded, release-named) tensors: the one description that initialisation, checkpoints,
EMA, gradient export and format conversion share.

A local parameter is cut into **pieces**, each a rectangle of the parameter that equals a rectangle of one canonical tensor. Tensors are
1-D or 2-D; a 1-D tensor is treated as a single column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A rectangle of a local parameter and where it stands in a canonical tensor."""

    key: str
    """Name of the canonical tensor (Open-Sora v2 release key)."""
    global_shape: tuple[int, ...]
    """Shape of the whole canonical tensor."""
    global_offset: tuple[int, ...]
    """First element of the rectangle in the canonical tensor, per dim."""
    local_offset: tuple[int, ...]
    """First element of the rectangle in the local parameter, per dim."""
    shape: tuple[int, ...]
    """Extents of the rectangle."""

    def view(self, parameter: Tensor) -> Tensor:
        """The rectangle as a view of the local parameter."""
        for dim, (start, extent) in enumerate(zip(self.local_offset, self.shape, strict=True)):
            parameter = parameter.narrow(dim, start, extent)
        return parameter

    @property
    def global_slices(self) -> tuple[slice, ...]:
        """Slices that select the rectangle in the canonical tensor."""
        return tuple(slice(start, start + extent) for start, extent in zip(self.global_offset, self.shape, strict=True))

    def element_index(self, *, device: torch.device | str = "cpu") -> Tensor:
        """int64, shape of the rectangle: row-major element numbers in the canonical tensor."""
        axes = [torch.arange(start, start + extent, device=device) for start, extent in zip(self.global_offset, self.shape, strict=True)]
        if len(axes) == 1:
            return axes[0]
        return axes[0][:, None] * self.global_shape[1] + axes[1][None, :]


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """A rectangle of a canonical tensor that a contiguous run of a flat buffer (or a strided part of it) holds."""

    piece: Piece
    start: int
    """First element in the flat buffer."""
    strides: tuple[int, ...]
    """Strides of the view into the flat buffer."""
    shape: tuple[int, ...]
    global_offset: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        """The rectangle as a view of the flat buffer."""
        return flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.start)


def rectangles(pieces: tuple[Piece, ...], *, local_shape: tuple[int, ...], start: int, stop: int) -> Iterator[Rectangle]:
    """Rectangles of canonical tensors covered by elements [start, stop) of a flattened local parameter.

    A flat range of a matrix is a partial first row, whole rows and a partial last row: at most three rectangles per piece. Nothing is
    copied or gathered, so a sharded optimizer can save its range in place (proof: at most three `ShardedTensor`s per shard and piece).
    """
    columns = local_shape[1] if len(local_shape) == 2 else local_shape[0]
    for row_start, num_rows, column_start, num_columns, offset in _bands(start, stop, columns):
        for piece in pieces:
            yield from _intersect(piece, row_start, num_rows, column_start, num_columns, offset, columns, len(local_shape))


def _bands(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(first row, rows, first column, columns, offset in the flat range) of at most three bands."""
    position = start
    while position < stop:
        row, column = divmod(position, columns)
        if column == 0 and stop - position >= columns:
            num_rows, num_columns = (stop - position) // columns, columns
        else:
            num_rows, num_columns = 1, min(columns - column, stop - position)
        yield row, num_rows, column, num_columns, position - start
        position += num_rows * num_columns


def _intersect(
    piece: Piece, row: int, num_rows: int, column: int, num_columns: int, offset: int, columns: int, ndim: int
) -> Iterator[Rectangle]:
    row_origin, column_origin = piece.local_offset if ndim == 2 else (0, piece.local_offset[0])
    rows_of_piece, columns_of_piece = piece.shape if ndim == 2 else (1, piece.shape[0])
    top, bottom = max(row, row_origin), min(row + num_rows, row_origin + rows_of_piece)
    left, right = max(column, column_origin), min(column + num_columns, column_origin + columns_of_piece)
    if top >= bottom or left >= right:
        return
    start = offset + (top - row) * num_columns + (left - column)
    if ndim == 1:
        yield Rectangle(
            piece=piece,
            start=start,
            strides=(1,),
            shape=(right - left,),
            global_offset=(piece.global_offset[0] + left - column_origin,),
        )
        return
    yield Rectangle(
        piece=piece,
        start=start,
        strides=(num_columns if num_rows > 1 else columns, 1),
        shape=(bottom - top, right - left),
        global_offset=(piece.global_offset[0] + top - row_origin, piece.global_offset[1] + left - column_origin),
    )

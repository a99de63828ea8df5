"""Parameters that torch's FSDP2 has sharded: a rank holds a run of whole rows, so its part is again rectangles of canonical tensors.

Rows are dealt out as `torch.chunk` does: n ranks get ceil(R / n) rows each, the last ones fewer or none.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from megasora.parallel.shards import Piece


def held_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """(what this rank holds of a parameter, number of its first row); a parameter that is not sharded is held whole.

    The tensor shares the parameter's memory; writing to it writes the parameter.
    """
    if not isinstance(parameter, DTensor):
        return parameter.data, 0
    local = parameter.to_local().detach()
    rows, ranks = parameter.shape[0], parameter.device_mesh.size()
    share = -(-rows // ranks)
    first = min(rows, parameter.device_mesh.get_local_rank() * share)
    assert local.shape[0] == min(share, rows - first), f"FSDP2 gave {local.shape[0]} of {rows} rows over {ranks} ranks, not its share"
    return local, first


def pieces_of_rows(pieces: tuple[Piece, ...], *, first: int, count: int) -> tuple[Piece, ...]:
    """The parts of a local parameter's pieces that stand in its rows [first, first + count), with offsets in those rows."""
    cut: list[Piece] = []
    for piece in pieces:
        top, bottom = max(first, piece.local_offset[0]), min(first + count, piece.local_offset[0] + piece.shape[0])
        if top >= bottom:
            continue
        cut.append(
            Piece(
                key=piece.key,
                global_shape=piece.global_shape,
                global_offset=(piece.global_offset[0] + top - piece.local_offset[0], *piece.global_offset[1:]),
                local_offset=(top - first, *piece.local_offset[1:]),
                shape=(bottom - top, *piece.shape[1:]),
            )
        )
    return tuple(cut)


def reshard(modules: Iterable[nn.Module]) -> None:
    """Drop gathered parameters, so that the modules show their shards again; nothing happens to modules that FSDP2 does not manage."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

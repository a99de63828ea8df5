"""Fills a stage's parameters from canonical tensors and collects canonical tensors from stages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.config.errors import UserError
from megasora.config.schema import ModelConfig
from megasora.models.mmdit.canonical import canonical_parameters, held_parameters
from megasora.models.mmdit.model import MMDiT
from megasora.models.mmdit.sharded_state import tensor_replica
from megasora.parallel.groups import ParallelContext


@torch.no_grad()
def fill_parameters(
    chunks: Sequence[MMDiT],
    read: Callable[[str], Tensor],
    *,
    known: Collection[str],
    model: ModelConfig,
    context: ParallelContext,
) -> None:
    """Copy this rank's rectangles out of canonical tensors; a tensor that is not known (cond_in of a FLUX file) becomes zero.

    Raises:
        UserError: a tensor of integers where weights are expected.
    """
    for chunk in chunks:
        for _, held, pieces in held_parameters(chunk, model=model, tp_rank=context.at.tp, tp_size=context.topology.tp):
            for piece in pieces:
                view = piece.view(held)
                if piece.key not in known:
                    view.zero_()
                    continue
                tensor = read(piece.key)
                if not tensor.is_floating_point():
                    raise UserError(f"{piece.key} holds {tensor.dtype}, weights must be floating point")
                view.copy_(tensor[piece.global_slices])


def collect(
    chunks: Sequence[MMDiT],
    value: Callable[[Tensor], Tensor],
    *,
    shapes: dict[str, tuple[int, ...]],
    model: ModelConfig,
    context: ParallelContext,
) -> dict[str, Tensor]:
    """Whole canonical tensors (fp32, on every rank) of something each parameter has, such as its gradient.

    Each element is given by one rank and summed over the world, tensor by tensor; meant for one replica (DP 1).
    """
    own: dict[str, list[tuple[tuple[slice, ...], Tensor]]] = {}
    for chunk in chunks:
        for _, parameter, pieces in canonical_parameters(chunk, model=model, tp_rank=context.at.tp, tp_size=context.topology.tp):
            if context.at.cp == 0 and context.at.dp == 0 and tensor_replica(parameter, context.at.tp) == 0:
                for piece in pieces:
                    own.setdefault(piece.key, []).append((piece.global_slices, piece.view(value(parameter))))
    whole: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        tensor = torch.zeros(shape, device=context.device)
        for slices, part in own.get(key, []):
            tensor[slices] = part.float()
        dist.all_reduce(tensor)
        whole[key] = tensor
    return whole

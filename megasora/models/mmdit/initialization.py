"""Random initialisation by canonical name and element: the same weights in every layout, each rank filling only its shard.

adaLN-zero (Peebles & Xie, arXiv 2212.09748 section 3.2): modulations and the final projection start at zero, so every block starts as the
identity; other weights are normal with variance 2 / (fan in + fan out) (Glorot); `cond_in` is zero (Open-Sora models/mmdit/model.py).
"""

from __future__ import annotations

import hashlib

import torch

from megasora.config.schema import ModelConfig
from megasora.diffusion.philox import Stream, key_of, normal_at
from megasora.models.mmdit.canonical import held_parameters
from megasora.models.mmdit.model import MMDiT
from megasora.parallel.groups import ParallelContext
from megasora.parallel.shards import Piece

_ZERO = ("_mod.lin.", ".modulation.lin.", "final_layer.", "cond_in.")
"""Parts of the names whose tensors start at zero."""


@torch.no_grad()
def initialize_weights(chunks: list[MMDiT], *, model: ModelConfig, context: ParallelContext, seed: int) -> None:
    """Fill every parameter of this rank's chunks."""
    for chunk in chunks:
        for _, held, pieces in held_parameters(chunk, model=model, tp_rank=context.at.tp, tp_size=context.topology.tp):
            for piece in pieces:
                piece.view(held).copy_(initial_values(piece, seed=seed, device=held.device))


def initial_values(piece: Piece, *, seed: int, device: torch.device) -> torch.Tensor:
    """fp32 values of a rectangle of a canonical tensor."""
    if piece.key.endswith(".scale"):
        return torch.ones(piece.shape, device=device)
    if piece.key.endswith(".bias") or any(part in piece.key for part in _ZERO):
        return torch.zeros(piece.shape, device=device)
    name = int.from_bytes(hashlib.sha256(piece.key.encode()).digest()[:8], "big")
    key = key_of(seed=seed, stream=Stream.INIT, sample=name)
    fan_out, fan_in = piece.global_shape
    return normal_at(piece.element_index(device=device), key=key) * (2.0 / (fan_in + fan_out)) ** 0.5

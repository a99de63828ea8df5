"""Small layers of the MMDiT: embedders, modulation, the scales of the query/key norm.

Shape letters: s tokens of a share, S tokens of a context rank, n samples of the pack, H hidden, K head size.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasora.models.mmdit.spec import LayerFactory, device_of, mark_sequence_parallel
from megasora.parallel.tensor import copy_to_tensor_region, gather_last_dim

TIME_FACTOR = 1000.0
"""t in [0, 1] is embedded as 1000 t (FLUX modules/layers.py timestep_embedding)."""
MAX_PERIOD = 10_000.0
"""Longest period of the sinusoidal embedding (same source)."""


def sinusoidal_embedding(values: Tensor, *, dim: int) -> Tensor:
    """[n] -> [n, dim]: cos then sin of 1000 x value x 10000^(-i / (dim / 2)), in fp32 (fp64 for fp64 values)."""
    wide = values if values.dtype == torch.float64 else values.float()
    half = dim // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=wide.dtype, device=wide.device) / half)
    angles = TIME_FACTOR * wide[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear on one row per sample (replicated over TP)."""

    def __init__(self, input_size: int, hidden_size: int, *, layers: LayerFactory) -> None:
        super().__init__()
        self.in_layer = layers.replicated(input_size, hidden_size)
        self.out_layer = layers.replicated(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[n, input] -> [n, H]."""
        result: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return result


class Modulation(nn.Module):
    """SiLU then a column-parallel Linear of `vec`: `multiple` rows of H per sample, gathered over TP (27 % of the parameters live here)."""

    def __init__(self, hidden_size: int, multiple: int, *, layers: LayerFactory) -> None:
        super().__init__()
        self.multiple = multiple
        self.tp_group = layers.tp_group
        without_sp = dataclasses.replace(layers.config, sequence_parallel=False) if layers.config.sequence_parallel else layers.config
        self.lin = layers.on_samples(hidden_size, multiple * hidden_size, config=without_sp)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """[n, H] -> `multiple` tensors [n, H]."""
        rows = self.lin(F.silu(copy_to_tensor_region(vec, group=self.tp_group)))[0]
        return gather_last_dim(rows, group=self.tp_group).chunk(self.multiple, dim=-1)


class HeadNorm(nn.Module):
    """Learned scale of the RMSNorm of queries or keys over the head size; `kernels` norms, together with the rotary embedding.

    The scale is replicated; each TP rank norms its own heads, so its gradient is summed over TP.
    """

    def __init__(self, head_dim: int, *, layers: LayerFactory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim, device=device_of(layers.config), dtype=layers.config.params_dtype))
        mark_sequence_parallel(self, layers.config)


class QueryKeyNorm(nn.Module):
    """Scales of queries and keys; the attribute names are what Megatron looks for to sum their gradients over TP."""

    def __init__(self, head_dim: int, *, layers: LayerFactory) -> None:
        super().__init__()
        self.q_layernorm = HeadNorm(head_dim, layers=layers)
        self.k_layernorm = HeadNorm(head_dim, layers=layers)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """[K] of queries and of keys."""
        return self.q_layernorm.weight, self.k_layernorm.weight

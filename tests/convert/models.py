"""Small models with all kinds of names, as files of every format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megasora.checkpoint.formats.canonical import canonical_shapes
from megasora.checkpoint.formats.mapping import compose, read_segments
from megasora.checkpoint.formats.rules import Format
from megasora.checkpoint.safetensors_io import write_safetensors
from megasora.checkpoint.tensors import StateDictReader, as_torch
from megasora.config.schema import ModelConfig

DEV = ModelConfig(
    hidden_size=32,
    num_attention_heads=2,
    num_double_blocks=2,
    num_single_blocks=3,
    ffn_hidden_size=80,
    in_channels=16,
    text_dim=12,
    vec_dim=6,
    time_dim=8,
    axes_dim=(2, 7, 7),
    cond_embed=False,
    guidance_embed=True,
)
"""FLUX.1-dev, small."""
V2 = replace(DEV, cond_embed=True, guidance_embed=False)
"""Open-Sora v2, small."""
DC_AE = replace(V2, in_channels=128, patch_size=1)
SCHNELL = replace(DEV, guidance_embed=False)


def random_weights(model: ModelConfig, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Canonical tensors of random values, none zero."""
    generator = torch.Generator().manual_seed(seed)
    return {key: (torch.randn(shape, generator=generator) + 3.0).to(dtype) for key, shape in canonical_shapes(model).items()}


def foreign(tensors: dict[str, Tensor], fmt: Format, model: ModelConfig) -> dict[str, Tensor]:
    """The same weights in a format."""
    reader = StateDictReader(tensors)
    result = {}
    for key, segments in compose("megasora", fmt, model).items():
        rows = read_segments(segments, reader, head_dim=model.head_dim)
        info = replace(reader.infos[segments[0].key], shape=(len(rows), *reader.infos[segments[0].key].shape[1:]))
        result[key] = as_torch(rows, info)
    return result


def write_weights(path: Path, fmt: Format, model: ModelConfig, **options: object) -> dict[str, Tensor]:
    """Write random weights as one file; returns its tensors."""
    tensors = foreign(random_weights(model, **options), fmt, model)  # type: ignore[arg-type]
    write_safetensors(path, tensors, metadata={"format": "pt"})
    return tensors

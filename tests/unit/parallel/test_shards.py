"""Flat optimizer runs as rectangles of canonical tensors: complete, disjoint, in place."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.config.schema import ModelConfig
from megasora.models.mmdit.canonical import pieces_of
from megasora.parallel.shards import rectangles

MODEL = ModelConfig(hidden_size=8, num_attention_heads=2, num_double_blocks=1, num_single_blocks=1, ffn_hidden_size=32)
NAMES = {
    "double_blocks.0.img.attn.qkv.weight": (24, 8, 0),
    "double_blocks.0.img.attn.qkv.bias": (24, None, 0),
    "single_blocks.0.linear1.weight": (56, 8, 0),
    "single_blocks.0.linear2.weight": (8, 40, 1),
    "double_blocks.0.txt.mlp.fc2.weight": (8, 32, 1),
    "double_blocks.0.txt.mod.lin.weight": (48, 8, 0),
    "img_in.weight": (8, 64, None),
}


@given(st.sampled_from(sorted(NAMES)), st.sampled_from([1, 2]), st.data())
@settings(max_examples=80, deadline=None)
def test_runs_cover_a_parameter_exactly(name: str, tp: int, data: st.DataObject) -> None:
    rows, columns, split = NAMES[name]
    shape = [rows] if columns is None else [rows, columns]
    if split is not None:
        shape[split] //= tp
    numel = torch.Size(shape).numel()
    cuts = sorted(data.draw(st.lists(st.integers(0, numel), max_size=4)))
    canonical: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for rank in range(tp):
        pieces = pieces_of(name, tuple(shape), model=MODEL, tp_rank=rank, tp_size=tp)
        local = torch.arange(numel, dtype=torch.float64).view(shape) + 10_000 * rank
        for start, stop in zip([0, *cuts], [*cuts, numel], strict=True):
            flat = local.flatten()[start:stop].clone()
            boxes = list(rectangles(pieces, local_shape=tuple(shape), start=start, stop=stop))
            assert len(boxes) <= 3 * len(pieces)
            for box in boxes:
                where = tuple(slice(o, o + e) for o, e in zip(box.global_offset, box.shape, strict=True))
                canonical.setdefault(box.piece.key, torch.zeros(box.piece.global_shape, dtype=torch.float64))[where] = box.view(flat)
                counts.setdefault(box.piece.key, torch.zeros(box.piece.global_shape))[where] += 1
        for piece in pieces:
            assert torch.equal(canonical[piece.key][piece.global_slices], piece.view(local))
    replicas = tp if split is None else 1
    assert all(bool((count == replicas).all()) for count in counts.values())

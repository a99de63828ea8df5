"""Local parameters <-> canonical tensors: which rectangle of which Open-Sora v2 release tensor each part of a TP shard is.

The release splits what we fuse (q_proj, k_proj, v_proj; single blocks q_proj, k_proj, v_mlp) and we shard what it does not; both facts
live here and nowhere else. Source of the names: the released Open_Sora_v2.safetensors (hpcai-tech/Open-Sora-v2).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from megasora.config.schema import ModelConfig
from megasora.parallel.row_shards import held_rows, pieces_of_rows
from megasora.parallel.shards import Piece

_RENAMES = (
    (r"^double_blocks\.(\d+)\.(img|txt)\.attn\.norm\.q_layernorm\.weight$", r"double_blocks.\1.\2_attn.norm.query_norm.scale"),
    (r"^double_blocks\.(\d+)\.(img|txt)\.attn\.norm\.k_layernorm\.weight$", r"double_blocks.\1.\2_attn.norm.key_norm.scale"),
    (r"^double_blocks\.(\d+)\.(img|txt)\.attn\.", r"double_blocks.\1.\2_attn."),
    (r"^double_blocks\.(\d+)\.(img|txt)\.mlp\.fc1\.", r"double_blocks.\1.\2_mlp.0."),
    (r"^double_blocks\.(\d+)\.(img|txt)\.mlp\.fc2\.", r"double_blocks.\1.\2_mlp.2."),
    (r"^double_blocks\.(\d+)\.(img|txt)\.mod\.", r"double_blocks.\1.\2_mod."),
    (r"^single_blocks\.(\d+)\.norm\.q_layernorm\.weight$", r"single_blocks.\1.norm.query_norm.scale"),
    (r"^single_blocks\.(\d+)\.norm\.k_layernorm\.weight$", r"single_blocks.\1.norm.key_norm.scale"),
    (r"^final_layer\.adaLN_modulation\.lin\.", r"final_layer.adaLN_modulation.1."),
)


def release_name(name: str) -> str:
    """Release key of a local parameter that is one tensor there (fused parameters are cut in `pieces_of`)."""
    for pattern, replacement in _RENAMES:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def _rectangle(key: str, global_shape: tuple[int, ...], shape: tuple[int, ...], *, local: tuple[int, ...], place: tuple[int, ...]) -> Piece:
    return Piece(key=key, global_shape=global_shape, shape=shape, local_offset=local, global_offset=place)


def _stacked_rows(tail: tuple[int, ...], parts: list[tuple[str, int, int, int]], *, tp_rank: int, tp_size: int) -> tuple[Piece, ...]:
    """Pieces of a column-parallel parameter whose local rows are a stack of parts (key, rows of the key, first row there, rows in all)."""
    pieces: list[Piece] = []
    position = 0
    origin = (0,) * len(tail)
    for key, key_rows, first, rows in parts:
        own = rows // tp_size
        pieces.append(_rectangle(key, (key_rows, *tail), (own, *tail), local=(position, *origin), place=(first + tp_rank * own, *origin)))
        position += own
    return tuple(pieces)


def pieces_of(name: str, shape: tuple[int, ...], *, model: ModelConfig, tp_rank: int, tp_size: int) -> tuple[Piece, ...]:
    """Canonical rectangles of one local parameter.

    Args:
        name: parameter name in the stage (global block numbers).
        shape: its local shape.
        model: sizes.
        tp_rank, tp_size: place on the tensor axis.
    """
    h, ffn = model.hidden_size, model.ffn_hidden_size
    prefix, _, kind = release_name(name).rpartition(".")
    tail = shape[1:]
    if prefix.endswith("_attn.qkv"):
        stem = prefix.removesuffix("qkv")
        parts = [(f"{stem}{part}_proj.{kind}", h, 0, h) for part in ("q", "k", "v")]
        return _stacked_rows(tail, parts, tp_rank=tp_rank, tp_size=tp_size)
    if prefix.endswith(".linear1"):
        stem = prefix.removesuffix("linear1")
        both = h + ffn
        parts = [
            (f"{stem}q_proj.{kind}", h, 0, h),
            (f"{stem}k_proj.{kind}", h, 0, h),
            (f"{stem}v_mlp.{kind}", both, 0, h),
            (f"{stem}v_mlp.{kind}", both, h, ffn),
        ]
        return _stacked_rows(tail, parts, tp_rank=tp_rank, tp_size=tp_size)
    key = f"{prefix}.{kind}"
    if prefix.endswith(".linear2") and kind == "weight":
        own, own_ffn = h // tp_size, ffn // tp_size
        return (
            _rectangle(key, (h, h + ffn), (h, own), local=(0, 0), place=(0, tp_rank * own)),
            _rectangle(key, (h, h + ffn), (h, own_ffn), local=(0, own), place=(0, h + tp_rank * own_ffn)),
        )
    split = _split_dim(prefix, kind)
    if split is None:
        return (_rectangle(key, shape, shape, local=(0,) * len(shape), place=(0,) * len(shape)),)
    whole = tuple(extent * tp_size if dim == split else extent for dim, extent in enumerate(shape))
    place = tuple(tp_rank * extent if dim == split else 0 for dim, extent in enumerate(shape))
    return (_rectangle(key, whole, shape, local=(0,) * len(shape), place=place),)


def _split_dim(prefix: str, kind: str) -> int | None:
    """Which dim of a plain parameter TP cuts: rows of column-parallel layers, columns of row-parallel weights, nothing else."""
    if prefix.endswith(("_mlp.0", "_mod.lin", ".modulation.lin", ".adaLN_modulation.1")):
        return 0
    if prefix.endswith(("_attn.proj", "_mlp.2")) and kind == "weight":
        return 1
    return None


def canonical_parameters(
    module: nn.Module, *, model: ModelConfig, tp_rank: int, tp_size: int
) -> Iterator[tuple[str, Tensor, tuple[Piece, ...]]]:
    """(local name, parameter, pieces) of every parameter of a stage, in registration order."""
    for name, parameter in module.named_parameters():
        yield name, parameter, pieces_of(name, tuple(parameter.shape), model=model, tp_rank=tp_rank, tp_size=tp_size)


def held_parameters(
    module: nn.Module, *, model: ModelConfig, tp_rank: int, tp_size: int
) -> Iterator[tuple[Tensor, Tensor, tuple[Piece, ...]]]:
    """(parameter, what this rank holds of it, pieces of that) of every parameter of a stage; ZeRO-2 and ZeRO-3 hold a run of its rows."""
    for _, parameter, pieces in canonical_parameters(module, model=model, tp_rank=tp_rank, tp_size=tp_size):
        held, first = held_rows(parameter)
        yield parameter, held, pieces_of_rows(pieces, first=first, count=held.shape[0])

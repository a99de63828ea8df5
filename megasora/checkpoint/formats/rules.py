"""Each foreign format as one table, read in both directions: a foreign tensor is a stack of rows of canonical tensors.

Three things differ between formats: names, which matrices are fused, and the order of rows. FLUX and diffusers rotate neighbouring dims
(2i, 2i+1) where Open-Sora v2 rotates halves (i, i + K/2), so rows of queries and keys and their norm scales are permuted per head;
diffusers stores the final modulation as (scale, shift). Sources: black-forest-labs/flux model.py and modules/layers.py;
huggingface/diffusers models/transformers/transformer_flux.py; hpcaitech/Open-Sora models/mmdit/layers.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeVar

from megasora.checkpoint.formats.canonical import canonical_shapes
from megasora.checkpoint.tensors import Rows
from megasora.config.schema import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

Format = Literal["flux", "diffusers", "opensora", "opensora-fused", "megasora"]
FORMATS: tuple[Format, ...] = ("flux", "diffusers", "opensora", "opensora-fused", "megasora")
"""megasora: our distributed checkpoints, which hold the canonical tensors."""
Order = Literal["same", "heads", "swap"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of rows of a foreign tensor and where it comes from."""

    key: str
    """Canonical tensor."""
    start: int
    """First row there."""
    rows: int
    order: Order = "same"
    """same; heads: interleaved rotary rows per head; swap: the two halves exchanged."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A foreign tensor as a stack of parts."""

    key: str
    parts: tuple[Part, ...]


RowsT = TypeVar("RowsT", "Tensor", Rows)


def to_foreign_order(rows: RowsT, *, order: Order, head_dim: int) -> RowsT:
    """Canonical rows (a torch tensor, or bytes) in a foreign order."""
    if order == "heads":
        return _exchange(rows, 2, head_dim // 2)
    return _swapped(rows) if order == "swap" else rows


def to_canonical_order(rows: RowsT, *, order: Order, head_dim: int) -> RowsT:
    """Inverse of `to_foreign_order`."""
    if order == "heads":
        return _exchange(rows, head_dim // 2, 2)
    return _swapped(rows) if order == "swap" else rows


def _exchange(rows: RowsT, outer: int, inner: int) -> RowsT:
    """Rows counted (outer, inner) within each head, counted (inner, outer)."""
    return rows.reshape(-1, outer, inner, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)  # type: ignore[return-value]


def _swapped(rows: RowsT) -> RowsT:
    return rows.reshape(2, -1, *rows.shape[1:])[[1, 0]].reshape(rows.shape)  # type: ignore[return-value]


def rules_of(fmt: Format, model: ModelConfig) -> tuple[Rule, ...]:
    """Every tensor of a model in a format; together they use each canonical tensor exactly once."""
    if fmt in ("opensora", "megasora"):
        return tuple(Rule(key=key, parts=(_whole(model, key),)) for key in canonical_shapes(model))
    if fmt == "diffusers":
        return tuple(_diffusers_rules(model))
    return tuple(_fused_rules(model, order="heads" if fmt == "flux" else "same"))


def _whole(model: ModelConfig, key: str, order: Order = "same") -> Part:
    return Part(key=key, start=0, rows=canonical_shapes_cached(model)[key][0], order=order)


@lru_cache(maxsize=8)
def canonical_shapes_cached(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """`canonical_shapes`, computed once per model."""
    return canonical_shapes(model)


def _fused_rules(model: ModelConfig, *, order: Order) -> Iterator[Rule]:
    """BFL's layout: qkv and linear1 fused."""
    done: set[str] = set()
    for key in canonical_shapes_cached(model):
        if key in done:
            continue
        stem, _, kind = key.rpartition(".")
        if stem.endswith(("_attn.q_proj", ".q_proj")):
            stem = stem.removesuffix("q_proj")
            double = stem.endswith("_attn.")
            third = f"{stem}v_proj.{kind}" if double else f"{stem}v_mlp.{kind}"
            parts = (_whole(model, f"{stem}q_proj.{kind}", order), _whole(model, f"{stem}k_proj.{kind}", order), _whole(model, third))
            done |= {part.key for part in parts}
            yield Rule(key=f"{stem}{'qkv' if double else 'linear1'}.{kind}", parts=parts)
        elif key.endswith("_norm.scale"):
            yield Rule(key=key, parts=(_whole(model, key, order),))
        else:
            yield Rule(key=key, parts=(_whole(model, key),))


_DIFFUSERS_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
    "cond_in": "cond_in",
}
_DIFFUSERS_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.q_proj": "attn.to_q",
    "img_attn.k_proj": "attn.to_k",
    "img_attn.v_proj": "attn.to_v",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.q_proj": "attn.add_q_proj",
    "txt_attn.k_proj": "attn.add_k_proj",
    "txt_attn.v_proj": "attn.add_v_proj",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_DIFFUSERS_SINGLE = {
    "modulation.lin": "norm.linear",
    "q_proj": "attn.to_q",
    "k_proj": "attn.to_k",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}


def _diffusers_rules(model: ModelConfig) -> Iterator[Rule]:
    for key in canonical_shapes_cached(model):
        stem, _, kind = key.rpartition(".")
        kind = "weight" if kind == "scale" else kind
        order: Order = "heads" if stem.endswith(("q_proj", "k_proj", "query_norm", "key_norm")) else "same"
        if stem.startswith("double_blocks."):
            _, block, rest = stem.split(".", 2)
            yield Rule(key=f"transformer_blocks.{block}.{_DIFFUSERS_DOUBLE[rest]}.{kind}", parts=(_whole(model, key, order),))
        elif stem.startswith("single_blocks."):
            _, block, rest = stem.split(".", 2)
            prefix = f"single_transformer_blocks.{block}"
            if rest == "v_mlp":
                h, ffn = model.hidden_size, model.ffn_hidden_size
                yield Rule(key=f"{prefix}.attn.to_v.{kind}", parts=(Part(key=key, start=0, rows=h),))
                yield Rule(key=f"{prefix}.proj_mlp.{kind}", parts=(Part(key=key, start=h, rows=ffn),))
            else:
                yield Rule(key=f"{prefix}.{_DIFFUSERS_SINGLE[rest]}.{kind}", parts=(_whole(model, key, order),))
        else:
            swap: Order = "swap" if stem == "final_layer.adaLN_modulation.1" else "same"
            yield Rule(key=f"{_DIFFUSERS_TOP[stem]}.{kind}", parts=(_whole(model, key, swap),))

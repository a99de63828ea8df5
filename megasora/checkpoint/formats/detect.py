"""What a weight file is: its format, and the model's sizes read from its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from megasora.checkpoint.formats.rules import Format
from megasora.config.errors import UserError
from megasora.config.schema import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]


def detect_format(shapes: Shapes) -> Format:
    """Format of a set of tensors.

    Raises:
        UserError: none of ours; says what it looks like.
    """
    if "transformer_blocks.0.attn.to_q.weight" in shapes or "x_embedder.weight" in shapes:
        return "diffusers"
    if "img_in.weight" in shapes:
        if any(key.endswith(("_attn.q_proj.weight", ".v_mlp.weight")) for key in shapes):
            return "opensora"
        return "opensora-fused" if "cond_in.weight" in shapes else "flux"
    some = ", ".join(sorted(shapes)[:3])
    raise UserError(f"these are no FLUX, diffusers or Open-Sora weights; the first tensors are {some or 'none'}")


def detect_model(shapes: Shapes, fmt: Format, *, axes_dim: tuple[int, int, int] | None = None) -> ModelConfig:
    """Sizes of the model; rotary axes are K/8, 7K/16, 7K/16 unless given (FLUX's 16, 56, 56 of 128).

    Raises:
        UserError: a tensor that tells a size is missing.
    """
    names = _DIFFUSERS_NAMES if fmt == "diffusers" else _BFL_NAMES
    try:
        hidden, in_channels = shapes[names["img_in"]]
        text_dim, vec_dim, time_dim = (shapes[names[name]][1] for name in ("txt_in", "vector_in", "time_in"))
        (head_dim,) = shapes[names["scale"]]
        ffn = shapes[names["mlp"]][0]
        if min(hidden, in_channels, text_dim, vec_dim, time_dim, head_dim, ffn) < 1 or hidden % head_dim:
            raise ValueError(f"a size of {hidden} hidden, {head_dim} per head")
        cond = shapes.get("cond_in.weight")
        if cond is not None and (len(cond) != 2 or cond[1] <= in_channels):
            raise ValueError(f"cond_in.weight {cond}")
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"these look like {fmt} weights, but {error} is missing or does not fit") from error
    patch_size = round((cond[1] - in_channels) ** 0.5) if cond else (1 if in_channels == 128 else 2)
    return ModelConfig(
        hidden_size=hidden,
        num_attention_heads=hidden // head_dim,
        num_double_blocks=_count(shapes, names["double"]),
        num_single_blocks=_count(shapes, names["single"]),
        ffn_hidden_size=ffn,
        in_channels=in_channels,
        patch_size=patch_size,
        text_dim=text_dim,
        vec_dim=vec_dim,
        time_dim=time_dim,
        axes_dim=axes_dim or (head_dim // 8, 7 * head_dim // 16, 7 * head_dim // 16),
        guidance_embed=names["guidance_in"] in shapes,
        cond_embed=cond is not None,
    )


_BFL_NAMES = {
    "img_in": "img_in.weight",
    "txt_in": "txt_in.weight",
    "vector_in": "vector_in.in_layer.weight",
    "time_in": "time_in.in_layer.weight",
    "guidance_in": "guidance_in.in_layer.weight",
    "scale": "double_blocks.0.img_attn.norm.query_norm.scale",
    "mlp": "double_blocks.0.img_mlp.0.weight",
    "double": r"double_blocks\.(\d+)\.",
    "single": r"single_blocks\.(\d+)\.",
}
_DIFFUSERS_NAMES = {
    "img_in": "x_embedder.weight",
    "txt_in": "context_embedder.weight",
    "vector_in": "time_text_embed.text_embedder.linear_1.weight",
    "time_in": "time_text_embed.timestep_embedder.linear_1.weight",
    "guidance_in": "time_text_embed.guidance_embedder.linear_1.weight",
    "scale": "transformer_blocks.0.attn.norm_q.weight",
    "mlp": "transformer_blocks.0.ff.net.0.proj.weight",
    "double": r"transformer_blocks\.(\d+)\.",
    "single": r"single_transformer_blocks\.(\d+)\.",
}


def _count(shapes: Shapes, pattern: str) -> int:
    """Blocks of a kind: as many as there are different numbers (a hole is found when the tensors are compared)."""
    return len({match.group(1) for key in shapes if (match := re.match(pattern, key))})

"""The canonical form: every tensor of the MMDiT under its Open-Sora v2 release key, unsharded, rotate-half row order."""

from __future__ import annotations

from megasora.config.schema import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def canonical_shapes(model: ModelConfig) -> Shapes:
    """Every release key and its shape (for the default sizes exactly the released Open_Sora_v2.safetensors)."""
    h, ffn = model.hidden_size, model.ffn_hidden_size
    shapes: Shapes = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)

    linear("img_in", model.in_channels, h)
    linear("txt_in", model.text_dim, h)
    for name, inputs in _embedders(model):
        linear(f"{name}.in_layer", inputs, h)
        linear(f"{name}.out_layer", h, h)
    if model.cond_embed:
        linear("cond_in", model.cond_channels, h)
    for block in range(model.num_double_blocks):
        for stream in ("img", "txt"):
            stem = f"double_blocks.{block}.{stream}"
            linear(f"{stem}_mod.lin", h, 6 * h)
            for part in ("q_proj", "k_proj", "v_proj", "proj"):
                linear(f"{stem}_attn.{part}", h, h)
            shapes[f"{stem}_attn.norm.query_norm.scale"] = shapes[f"{stem}_attn.norm.key_norm.scale"] = (model.head_dim,)
            linear(f"{stem}_mlp.0", h, ffn)
            linear(f"{stem}_mlp.2", ffn, h)
    for block in range(model.num_single_blocks):
        stem = f"single_blocks.{block}"
        linear(f"{stem}.modulation.lin", h, 3 * h)
        linear(f"{stem}.q_proj", h, h)
        linear(f"{stem}.k_proj", h, h)
        linear(f"{stem}.v_mlp", h, h + ffn)
        linear(f"{stem}.linear2", h + ffn, h)
        shapes[f"{stem}.norm.query_norm.scale"] = shapes[f"{stem}.norm.key_norm.scale"] = (model.head_dim,)
    linear("final_layer.adaLN_modulation.1", h, 2 * h)
    linear("final_layer.linear", h, model.in_channels)
    return shapes


def _embedders(model: ModelConfig) -> list[tuple[str, int]]:
    names = [("time_in", model.time_dim), ("vector_in", model.vec_dim)]
    return [*names, ("guidance_in", model.time_dim)] if model.guidance_embed else names

"""Parameter counts of the MMDiT as pure arithmetic; equals the released key list for every variant (tests)."""

from __future__ import annotations

from megasora.config.schema import ModelConfig


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def double_block_parameters(model: ModelConfig) -> int:
    """Parameters of one double block."""
    h, f = model.hidden_size, model.ffn_hidden_size
    stream = _linear(h, 6 * h) + 4 * _linear(h, h) + 2 * model.head_dim + _linear(h, f) + _linear(f, h)
    return 2 * stream


def single_block_parameters(model: ModelConfig) -> int:
    """Parameters of one single block."""
    h, f = model.hidden_size, model.ffn_hidden_size
    return _linear(h, 3 * h) + _linear(h, 3 * h + f) + _linear(h + f, h) + 2 * model.head_dim


def modulation_parameters(model: ModelConfig) -> int:
    """Parameters of the blocks' modulations, the part that must be sharded over TP (27.2 % of Open-Sora v2)."""
    h = model.hidden_size
    blocks = model.num_double_blocks * 12 + model.num_single_blocks * 3
    return blocks * (h * h + h)


def embedder_parameters(model: ModelConfig) -> int:
    """Parameters before the blocks: what pipeline stage 0 holds besides its blocks."""
    h = model.hidden_size
    embedders = _linear(model.in_channels, h) + _linear(model.text_dim, h)
    vectors = _linear(model.time_dim, h) + _linear(h, h) + _linear(model.vec_dim, h) + _linear(h, h)
    if model.guidance_embed:
        vectors += _linear(model.time_dim, h) + _linear(h, h)
    if model.cond_embed:
        embedders += _linear(model.cond_channels, h)
    return embedders + vectors


def final_layer_parameters(model: ModelConfig) -> int:
    """Parameters of the last layer, which the last pipeline stage holds."""
    h = model.hidden_size
    return _linear(h, 2 * h) + _linear(h, model.in_channels)


def parameter_count(model: ModelConfig) -> int:
    """All parameters."""
    blocks = model.num_double_blocks * double_block_parameters(model) + model.num_single_blocks * single_block_parameters(model)
    return embedder_parameters(model) + blocks + final_layer_parameters(model)

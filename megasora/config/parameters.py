"""Parameter counts of the MMDiT as pure arithmetic; equals the released key list for every variant (tests)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


def replicated_in_block(model: ModelConfig, *, double: bool) -> int:
    """Parameters of a block that every TP rank holds whole: biases of row-parallel layers, scales of the query/key norms."""
    h, k = model.hidden_size, model.head_dim
    return 2 * (2 * h + 2 * k) if double else h + 2 * k


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


@dataclass(frozen=True, kw_only=True)
class ParameterShape:
    """A parameter on one TP rank."""

    rows: int
    width: int = 1
    """Elements of a row; 1 for vectors."""
    sequence_parallel: bool = False
    """Acts on token shares without being a TP shard: its gradient is summed over TP."""

    @property
    def elements(self) -> int:
        """Numbers of the parameter."""
        return self.rows * self.width

    def held(self, rank: int, shards: int) -> int:
        """Elements of the rows that one of the ranks holds that share it out as torch's FSDP2 does: ceil(rows / shards) each, the last
        ones fewer or none."""
        share = -(-self.rows // shards)
        return max(0, min(share, self.rows - rank * share)) * self.width


def parameter_shapes(model: ModelConfig, part: Literal["double", "single", "first", "last"], *, tp: int) -> list[ParameterShape]:
    """Parameters of a block of either kind, of what is before the blocks (first) or after them (last), on one TP rank,
    in the order of the model."""
    h, f, k = model.hidden_size, model.ffn_hidden_size, model.head_dim

    def column(inputs: int, outputs: int) -> list[ParameterShape]:
        return [ParameterShape(rows=outputs // tp, width=inputs), ParameterShape(rows=outputs // tp)]

    def row(inputs: int, outputs: int) -> list[ParameterShape]:
        return [ParameterShape(rows=outputs, width=inputs // tp), ParameterShape(rows=outputs, sequence_parallel=True)]

    def whole(inputs: int, outputs: int, *, on_tokens: bool) -> list[ParameterShape]:
        return [ParameterShape(rows=outputs, width=width, sequence_parallel=on_tokens) for width in (inputs, 1)]

    norms = [ParameterShape(rows=k, sequence_parallel=True)] * 2
    if part == "double":
        return 2 * [*column(h, 6 * h), *column(h, 3 * h), *norms, *row(h, h), *column(h, f), *row(f, h)]
    if part == "single":
        return [*column(h, 3 * h), *column(h, 3 * h + f), *norms, *row(h + f, h)]
    if part == "last":
        return [*column(h, 2 * h), *whole(h, model.in_channels, on_tokens=True)]
    vectors = [model.time_dim, model.vec_dim] + ([model.time_dim] if model.guidance_embed else [])
    shapes = [shape for inputs in (model.in_channels, model.text_dim) for shape in whole(inputs, h, on_tokens=True)]
    shapes += [shape for inputs in vectors for size in (inputs, h) for shape in whole(size, h, on_tokens=False)]
    return shapes + (whole(model.cond_channels, h, on_tokens=True) if model.cond_embed else [])

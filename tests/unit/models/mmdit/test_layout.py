"""What a stage owns, how its parameters stand in the release, and what they start from."""

from __future__ import annotations

import pytest
import torch

from megasora.config.pipeline_split import block_costs, split_by_cost
from megasora.config.schema import ModelConfig, ParallelConfig
from megasora.models.mmdit.canonical import pieces_of
from megasora.models.mmdit.initialization import initial_values
from megasora.models.mmdit.stages import stage_specs
from megasora.parallel.shards import Piece

MODEL = ModelConfig(hidden_size=8, num_attention_heads=2, ffn_hidden_size=32, num_double_blocks=3, num_single_blocks=5, axes_dim=(2, 1, 1))


def test_chunks_go_round_the_stages_and_only_the_outer_ones_embed_and_end() -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, pipeline_split="given", pipeline_blocks=(1, 2, 4, 1)
    )
    first, last = (stage_specs(MODEL, parallel, pp_rank=rank) for rank in (0, 1))
    assert [list(spec.blocks) for spec in (*first, *last)] == [[0], [3, 4, 5, 6], [1, 2], [7]]
    assert [spec.pre_process for spec in (*first, *last)] == [True, False, False, False]
    assert [spec.post_process for spec in (*first, *last)] == [False, False, False, True]


@pytest.mark.parametrize(("recompute", "counts"), [("none", (0, 0)), ("full", (8, 8)), ("count", (1, 2)), ("selective", (1, 2))])
def test_double_and_single_blocks_are_recomputed_as_asked(recompute: str, counts: tuple[int, int]) -> None:
    parallel = ParallelConfig(recompute=recompute, recompute_double_blocks=1, recompute_single_blocks=2)  # type: ignore[arg-type]
    (spec,) = stage_specs(MODEL, parallel, pp_rank=0)
    assert (spec.recompute_double, spec.recompute_single) == counts
    assert spec.selective == (recompute == "selective")


def test_a_split_weighs_blocks_by_what_it_is_asked_for() -> None:
    model = ModelConfig(num_double_blocks=2, num_single_blocks=2)
    # parameters are 36, 36, 15, 15: one block on the first stage leaves 66 on the second, two would be 72 on the first
    assert split_by_cost(block_costs(model, by="parameters"), 2) == (1, 3)
    assert split_by_cost(block_costs(model, by="flops"), 2) == (2, 2)


def test_a_fused_parameter_is_query_key_value_of_the_ranks_heads() -> None:
    pieces = pieces_of("double_blocks.0.img.attn.qkv.weight", (12, 8), model=MODEL, tp_rank=1, tp_size=2)
    assert [(piece.key, piece.local_offset, piece.global_offset, piece.shape) for piece in pieces] == [
        ("double_blocks.0.img_attn.q_proj.weight", (0, 0), (4, 0), (4, 8)),
        ("double_blocks.0.img_attn.k_proj.weight", (4, 0), (4, 0), (4, 8)),
        ("double_blocks.0.img_attn.v_proj.weight", (8, 0), (4, 0), (4, 8)),
    ]


def whole(key: str, *shape: int) -> torch.Tensor:
    zero = (0,) * len(shape)
    piece = Piece(key=key, global_shape=shape, shape=shape, global_offset=zero, local_offset=zero)
    return initial_values(piece, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "key", ["double_blocks.0.img_mod.lin.weight", "single_blocks.0.modulation.lin.weight", "final_layer.linear.weight", "cond_in.weight"]
)
def test_modulations_the_last_layer_and_the_condition_start_at_zero(key: str) -> None:
    assert not whole(key, 16, 16).any()


def test_other_weights_have_glorots_variance_scales_one_and_biases_zero() -> None:
    values = whole("img_in.weight", 200, 100)
    assert abs(float(values.std()) / (2 / 300) ** 0.5 - 1) < 4 * (1 / (2 * values.numel())) ** 0.5  # four standard errors
    assert whole("double_blocks.0.img_attn.norm.key_norm.scale", 4).tolist() == [1, 1, 1, 1]
    assert whole("img_in.bias", 4).tolist() == [0, 0, 0, 0]

"""Every check of a config: the field it blames, and that a sound config passes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megasora import recipes
from megasora.config.memory import model_state_bytes
from megasora.config.optimizer_checks import SMALLEST_RATE
from megasora.config.parameters import parameter_count
from megasora.config.schema import ModelConfig, ParallelConfig, RunConfig
from megasora.config.validate import problems

MIX = (("64px", 9, 0.5, 0.0),)
MIXED: dict[str, Any] = {"resolution": "mix", "buckets": "published", "bucket_mix": MIX, "frame_counts": (9,)}


def changed(section: str, **values: Any) -> RunConfig:
    """`tiny` on the CPU with other values in one section."""
    config = replace(recipes.get("tiny"), device="cpu")
    return replace(config, **{section: replace(getattr(config, section), **values)})


def blamed(config: RunConfig, *, world_size: int = 8) -> list[str]:
    """Fields of the problems found."""
    return [problem.field for problem in problems(config, world_size=world_size)]


@pytest.mark.parametrize(
    ("section", "values", "field"),
    [
        ("parallel", {"pipeline_model_parallel_size": 16}, "parallel.pipeline_model_parallel_size"),
        ("parallel", {"virtual_pipeline_model_parallel_size": 2}, "parallel.virtual_pipeline_model_parallel_size"),
        ("parallel", {"pipeline_split": "given", "pipeline_blocks": (4, 3)}, "parallel.pipeline_blocks"),
        ("parallel", {"pipeline_blocks": (8,)}, "parallel.pipeline_blocks"),
        ("parallel", {"ulysses_size": 2}, "parallel.ulysses_size"),
        ("parallel", {"overlap_param_gather": True, "overlap_grad_reduce": False}, "parallel.overlap_param_gather"),
        ("parallel", {"recompute": "count"}, "parallel.recompute"),
        ("parallel", {"offload": "inputs"}, "parallel.offload"),
        ("optimizer", {"exp_avg_dtype": "bf16"}, "optimizer.exp_avg_dtype"),  # kept by an Adam that needs CUDA
        ("parallel", {"tensor_model_parallel_size": 0}, "parallel.tensor_model_parallel_size"),
        ("parallel", {"pipeline_model_parallel_size": 0}, "parallel.pipeline_model_parallel_size"),
        ("model", {"num_attention_heads": 0}, "model.num_attention_heads"),
        ("model", {"patch_size": 0}, "model.patch_size"),
        ("model", {"axes_dim": (5, 5, 6)}, "model.axes_dim"),
        ("model", {"in_channels": 66}, "model.in_channels"),
        ("encoders", {"temporal_compression": 0}, "encoders.temporal_compression"),
        ("precision", {"provider": "te"}, "precision.provider"),
        ("precision", {"attention": "te"}, "precision.attention"),
        ("condition", {"t2v": -1.0}, "condition"),
        ("data", {"frame_counts": (16,)}, "data.frame_counts"),
        ("data", {"resolution": "mix"}, "data.resolution"),
        ("data", {"buckets": "published", "bucket_mix": MIX, "frame_counts": (9,)}, "data.resolution"),
        ("data", {"resolution": "mix", "bucket_mix": MIX, "frame_counts": (9,)}, "data.buckets"),
        ("data", {**MIXED, "resolution_mix": (("64px", 1.0),)}, "data.resolution_mix"),
        ("data", {**MIXED, "frame_counts": (17, 9)}, "data.frame_counts"),
        ("data", {**MIXED, "bucket_mix": (*MIX, ("64px", 8, 1.0, 0.0))}, "data.bucket_mix"),
        ("data", {**MIXED, "bucket_mix": (*MIX, ("64px", 9, 0.5, 0.0))}, "data.bucket_mix"),
        ("data", {**MIXED, "bucket_mix": (("64px", 9, 1.5, 0.0),)}, "data.bucket_mix"),
        ("data", {**MIXED, "bucket_mix": (("64px", 9, 1.0, 1.0),)}, "data.bucket_mix"),
        ("data", {**MIXED, "bucket_mix": (*MIX, ("64px", 1, 1.0, 0.5))}, "data.bucket_mix"),
        ("encoders", {"causal": False}, "data.frame_counts,sample.num_frames"),  # 17, 9 are no multiples of 4
        ("init", {"run": "a", "weights": "b"}, "init.run"),
        ("init", {"run_weights": "ema"}, "init.run_weights"),
        ("data", {"dropout_t5": 1.5}, "data.dropout_t5"),
        ("optimizer", {"lr": float("nan")}, "optimizer.lr"),
        ("optimizer", {"beta2": 1.0}, "optimizer.beta2"),
        ("optimizer", {"lr_milestones": ((9, 1e-3), (4, 1e-4))}, "optimizer.lr_milestones"),
        ("train", {"steps": 0}, "train.steps"),
        ("sample", {"height": 60}, "sample.height"),
        ("sample", {"num_frames": 16}, "sample.num_frames"),
        ("parallel", {"tensor_model_parallel_size": 16}, "parallel.tensor_model_parallel_size"),  # 8 heads
        ("parallel", {"context_parallel_backend": "ulysses_ring", "context_parallel_size": 2, "ulysses_size": 3}, "parallel.ulysses_size"),
        ("parallel", {"recompute_double_blocks": 1}, "parallel.recompute"),
        ("model", {"num_double_blocks": -1}, "model.num_double_blocks"),
        ("model", {"cond_embed": False}, "condition"),  # tiny draws i2v_head
        ("model", {"hidden_size": 132}, "model.hidden_size"),
        ("data", {"num_microbatches": 0}, "data.num_microbatches"),
        ("data", {"frame_counts": ()}, "data.frame_counts"),
        ("data", {"dropout_clip": -0.1}, "data.dropout_clip"),
        ("data", {"global_tokens": 0}, "data.global_tokens"),
        ("data", {"decode_timeout_s": 0.0}, "data.decode_timeout_s"),
        ("data", {"max_pack_tokens": 0}, "data.max_pack_tokens"),
        ("data", {"image_weight": 1001.0}, "data.image_weight"),
        ("data", {"video_weight": -1.0}, "data.video_weight"),
        ("data", {"resolution_mix": (("256px", 0.0),)}, "data.resolution_mix"),
        ("data", {"resolution_mix": (("256px", 2.0), ("768px", -1.0))}, "data.resolution_mix"),
        ("data", {"resolution_mix": (("256px", 1.0), ("256px", 2.0))}, "data.resolution_mix"),
        ("optimizer", {"beta1": -0.1}, "optimizer.beta1"),
        ("optimizer", {"eps": 0.0}, "optimizer.eps"),
        ("optimizer", {"ema_decay": 1.0}, "optimizer.ema_decay"),
        ("optimizer", {"clip_grad": -1.0}, "optimizer.clip_grad"),
        ("checkpoint", {"interval_steps": -1}, "checkpoint.interval_steps"),
        ("optimizer", {"warmup_steps": -5}, "optimizer.warmup_steps"),
        ("optimizer", {"weight_decay": -1.0}, "optimizer.weight_decay"),
        ("optimizer", {"lr": math.nan}, "optimizer.lr"),
        ("optimizer", {"lr_milestones": ((3, -1e-3),)}, "optimizer.lr_milestones"),
        ("checkpoint", {"keep": -1}, "checkpoint.keep"),
        ("checkpoint", {"keep_every_steps": -1}, "checkpoint.keep_every_steps"),
        ("train", {"log_interval_steps": 0}, "train.log_interval_steps"),
        ("evaluation", {"interval_steps": -1}, "evaluation.interval_steps"),
        ("evaluation", {"num_timestep_bins": 0}, "evaluation.num_timestep_bins"),
        ("encoders", {"scaling_factor": 0.0}, "encoders.scaling_factor"),
        ("model", {"guidance_embed": True}, "model.guidance_embed"),
        ("checkpoint", {"local_dir": "/disk"}, "checkpoint.local_interval_steps"),
        ("checkpoint", {"local_interval_steps": 5}, "checkpoint.local_interval_steps"),
        ("flow", {"sigma_min": 1.0}, "flow.sigma_min"),
        ("evaluation", {"sample_interval_steps": 5, "sample_prompts": ()}, "evaluation.sample_prompts"),
        ("sample", {"width": 8}, "sample.width"),
    ],
)
def test_one_wrong_value_blames_its_own_field_only(section: str, values: dict[str, Any], field: str) -> None:
    assert blamed(changed(section, **values), world_size=16) == field.split(",")


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("data", {"image_weight": 1000.0, "video_weight": 0.0}),
        ("data", {"resolution_mix": (("256px", 1.0), ("768px", 0.0))}),
        ("data", {"dropout_t5": 0.0, "dropout_clip": 1.0}),
        ("data", MIXED),
        ("data", {**MIXED, "bucket_mix": (("64px", 17, 0.0, 1.0), *MIX)}),
        ("init", {"run": "a", "run_weights": "model"}),
        ("optimizer", {"ema_decay": 0.0, "clip_grad": 0.0, "beta1": 0.0}),
        ("flow", {"sigma_min": 0.0}),
        ("sample", {"num_frames": 1}),
    ],
)
def test_the_ends_of_a_range_are_allowed(section: str, values: dict[str, Any]) -> None:
    assert blamed(changed(section, **values)) == []


def test_interleaving_takes_multiples_of_the_pipeline() -> None:
    config = changed("parallel", pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    for microbatches, wrong in ((3, ["data.num_microbatches"]), (4, [])):
        assert blamed(replace(config, data=replace(config.data, num_microbatches=microbatches))) == wrong


def test_tp_must_divide_the_feed_forward_layer() -> None:
    config = changed("parallel", tensor_model_parallel_size=8)
    assert blamed(replace(config, model=replace(config.model, ffn_hidden_size=516))) == ["model.ffn_hidden_size"]


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"fp8": "tensorwise"}, []),
        ({"fp8": "tensorwise", "dtype": "fp32"}, ["precision.fp8"]),
        ({"fp8": "tensorwise", "provider": "local"}, ["precision.fp8"]),
        ({"fp8": "mxfp8"}, ["precision.fp8"]),
    ],
)
def test_fp8_needs_bf16_transformer_engine_and_a_format_of_hopper(values: dict[str, Any], wrong: list[str]) -> None:
    config = replace(recipes.get("tiny"), device="cuda")
    assert blamed(replace(config, precision=replace(config.precision, **{"dtype": "bf16", **values}))) == wrong


def test_ulysses_needs_the_heads_of_a_tp_rank() -> None:
    sizes = {"tensor_model_parallel_size": 4, "context_parallel_size": 4}
    assert blamed(changed("parallel", context_parallel_backend="ulysses", **sizes), world_size=16) == ["parallel.context_parallel_size"]
    assert blamed(changed("parallel", context_parallel_backend="ring", **sizes), world_size=16) == []


@pytest.mark.parametrize(("tp", "wrong"), [(1, []), (16, ["model.hidden_size"])])
def test_fp8_needs_matrices_in_multiples_of_16(tp: int, wrong: list[str]) -> None:
    config = recipes.get("opensora2_stage1")
    model = replace(config.model, hidden_size=2944, num_attention_heads=16, axes_dim=(24, 80, 80), ffn_hidden_size=12288)
    parallel = ParallelConfig(tensor_model_parallel_size=tp, recompute="full")
    config = replace(config, model=model, parallel=parallel, device="cuda", precision=replace(config.precision, fp8="tensorwise"))
    assert blamed(config, world_size=64) == wrong


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 11_891_390_528),
        ({"cond_embed": False}, 11_891_178_560),
        ({"cond_embed": False, "guidance_embed": True}, 11_901_408_320),
        ({"in_channels": 128, "patch_size": 1}, 11_891_971_200),
    ],
)
def test_the_published_variants_count_exactly(changes: dict[str, Any], count: int) -> None:
    assert parameter_count(ModelConfig(**changes)) == count


@pytest.mark.parametrize(("world", "tp", "gigabytes"), [(1, 1, 214.0), (8, 1, 89.2), (8, 2, 53.7), (8, 8, 27.3), (224, 1, 72.0)])
def test_memory_matches_the_written_table(world: int, tp: int, gigabytes: float) -> None:
    config = recipes.get("opensora2_stage1")
    config = replace(
        config, optimizer=replace(config.optimizer, ema_decay=0.0), parallel=replace(config.parallel, tensor_model_parallel_size=tp)
    )
    assert model_state_bytes(config, world_size=world) / 1e9 == pytest.approx(gigabytes, abs=0.1)


@pytest.mark.parametrize("stage", [2, 3])
def test_fully_sharded_weights_take_fp8_and_refuse_overlaps_of_megatron(stage: int) -> None:
    config = replace(recipes.get("tiny"), device="cuda")
    config = replace(config, precision=replace(config.precision, dtype="bf16"), parallel=replace(config.parallel, zero_stage=stage))
    assert blamed(config) == []
    assert blamed(replace(config, precision=replace(config.precision, fp8="tensorwise"))) == []
    overlapping = replace(config.parallel, overlap_grad_reduce=True, overlap_param_gather=True)
    assert blamed(replace(config, parallel=overlapping)) == ["parallel.overlap_grad_reduce", "parallel.overlap_param_gather"]


@pytest.mark.parametrize(
    ("stage", "world", "tp", "gigabytes"),
    [
        # P = 11.891 B: bf16 weights gathered once and kept, or not; gradients 4, master 4 and moments 8 bytes by the ranks that share them
        (2, 224, 1, 2 * 11.891 + 16 * 11.891 / 224),
        (3, 224, 1, 16 * 11.891 / 224),
        # TP ranks each hold the embedders and the biases of row-parallel layers whole: 35.4 M parameters
        (3, 8, 2, 16 * (11.891 + 0.0354) / 4 / 2),
    ],
)
def test_memory_of_shared_gradients_and_weights(stage: int, world: int, tp: int, gigabytes: float) -> None:
    config = recipes.get("opensora2_stage1")
    parallel = replace(config.parallel, tensor_model_parallel_size=tp, zero_stage=stage)
    config = replace(config, optimizer=replace(config.optimizer, ema_decay=0.0), parallel=parallel)
    assert model_state_bytes(config, world_size=world) / 1e9 == pytest.approx(gigabytes, abs=0.02)


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp16", "eps": 1e-8}, []),
        ({"exp_avg_sq_dtype": "bf16", "beta2": 0.99}, []),
        ({"exp_avg_sq_dtype": "bf16", "beta2": 0.999}, ["optimizer.exp_avg_sq_dtype"]),
        ({"exp_avg_sq_dtype": "fp16", "beta2": 0.9999, "eps": 1e-8}, ["optimizer.exp_avg_sq_dtype"]),
        ({"exp_avg_sq_dtype": "fp16", "eps": 1e-15}, ["optimizer.eps"]),
        ({"exp_avg_dtype": "bf16", "beta1": 0.999}, ["optimizer.exp_avg_dtype"]),
    ],
)
def test_moments_that_would_stand_still_are_refused(values: dict[str, Any], fields: list[str]) -> None:
    config = replace(changed("optimizer", **values), device="cuda")
    assert blamed(config) == fields


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_a_moment_that_is_refused_stands_still_and_one_that_is_not_moves(kind: str) -> None:
    """The rule, by the formats themselves: x (1 - rate) of every x between 1 and 2, and just below."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    values = torch.linspace(0.5, 2, 3 * 2**11 + 1).to(dtype).unique().double()
    moves = [(values * (1 - rate)).to(dtype).double() != values for rate in (SMALLEST_RATE[kind] * 1.001, SMALLEST_RATE[kind] * 0.49)]
    assert moves[0].all()
    assert not moves[1].all()

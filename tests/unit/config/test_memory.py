"""Peak memory in advance: parts by hand, micro-batches in flight, and cures that cure. tests/memory compares with allocated bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megasora import recipes
from megasora.config.memory import host_bytes, memory_estimate, peak_in_flight
from megasora.config.pack_tokens import fullest_pack
from megasora.config.schema import RunConfig
from megasora.config.validate import problems


def on_gpus(recipe: str, *, data: dict[str, Any] | None = None, **parallel: Any) -> RunConfig:
    config = replace(recipes.get(recipe), device="cuda")
    return replace(config, parallel=replace(config.parallel, **parallel), data=replace(config.data, **(data or {})))


@pytest.mark.parametrize(("microbatches", "expected"), [(8, [4, 3, 2, 1]), (2, [2, 2, 2, 1])])
def test_a_stage_holds_as_many_micro_batches_as_stages_follow(microbatches: int, expected: list[int]) -> None:
    """1F1B: min(PP - p, M)."""
    found = [peak_in_flight([1.0], stage=stage, num_stages=4, num_microbatches=microbatches) for stage in range(4)]
    assert [peak for peak, _ in found] == expected
    assert [passes for _, passes in found] == expected


@pytest.mark.parametrize(("stage", "passes"), [(0, 5), (1, 3)])
def test_an_interleaved_stage_holds_more(stage: int, passes: int) -> None:
    """2 (PP - p - 1) + (VP - 1) PP passes of warm-up and one more."""
    assert peak_in_flight([1.0, 1.0], stage=stage, num_stages=2, num_microbatches=4) == (passes, passes)


def test_an_interleaved_stage_of_unequal_chunks_is_followed_pass_by_pass() -> None:
    """Stage 1 of 2 runs chunks 0 0 1 1 0 0 1 1 forward and 1 1 0 0 1 1 0 0 backward. After three passes it holds 10 + 10 + 1; backward
    frees chunk 1's while the next chunk 0's arrive: 21 - 1 + 1, 21 - 1 + 10 = 30, 30 - 10 + 10, 30 - 10 + 1."""
    assert peak_in_flight([10.0, 1.0], stage=1, num_stages=2, num_microbatches=4) == (30.0, 3)


def test_the_fullest_pack_of_a_published_recipe_is_its_batch_size() -> None:
    """50 images of 256 + 512 tokens, whose 38,400 tokens are at most 8.3 images of 1024px (64 x 64 + 512 each); 2 clips of 768px over CP 4;
    3 clips of 256px, longer than a 1024px image; 2 clips of the DC-AE."""
    mixed = recipes.get("opensora2_image")
    plain = replace(mixed, data=replace(mixed.data, resolution="256px", bucket_mix=()))
    image = fullest_pack(plain, world_size=224)
    assert (image.samples, image.text, image.video) == (50, 50 * 512, 50 * 256)
    image = fullest_pack(mixed, world_size=224)
    assert (image.samples, image.text, image.video) == (9, 9 * 512, 9 * 4096)
    stage1 = fullest_pack(recipes.get("opensora2_stage1"), world_size=224)
    assert (stage1.samples, stage1.text + stage1.video) == (3, 3 * 8_960)
    dc_ae = fullest_pack(recipes.get("opensora2_dc_ae"), world_size=160)
    assert (dc_ae.samples, dc_ae.text + dc_ae.video) == (2, 2 * 18_944)
    stage3 = fullest_pack(recipes.get("opensora2_stage3"), world_size=192)
    assert (stage3.samples, stage3.share(tp=1, cp=4, row_multiple=1)) == (2, 2 * 76_544 // 4)


def test_clips_are_not_cut_and_a_limit_takes_more_micro_batches() -> None:
    config = recipes.get("opensora2_stage1")  # 672 clips
    assert fullest_pack(config, world_size=256).samples == 3  # 2.6 each
    limited = fullest_pack(replace(config, data=replace(config.data, max_pack_tokens=10_000)), world_size=256)
    assert (limited.samples, limited.num_microbatches) == (1, 3)


@pytest.mark.parametrize(
    ("recipe", "gpus"),
    [("opensora2_image", 224), ("opensora2_stage1", 224), ("opensora2_stage2", 192), ("opensora2_stage3", 192), ("opensora2_dc_ae", 160)],
)
def test_published_recipes_fit_their_gpus(recipe: str, gpus: int) -> None:
    assert not problems(on_gpus(recipe), world_size=gpus)


def test_the_image_recipe_needs_its_recomputation() -> None:
    """57 blocks keep 19 x 22 + 38 x 19 tensors of 41,472 x 3,072 numbers, 271 GiB (9 images of 1024px)."""
    config = on_gpus("opensora2_image", recompute="none", recompute_double_blocks=0, recompute_single_blocks=0)
    estimate = memory_estimate(config, world_size=224)
    assert estimate.activations / 2**30 == pytest.approx((19 * 22 + 38 * 19) * 41_472 * 3_072 * 2 / 2**30, rel=0.01)
    (problem,) = problems(config, world_size=224)
    assert "activations 291 GB" in problem.message
    assert "selective" in problem.cure


@pytest.mark.parametrize(
    ("recipe", "gpus", "parallel"),
    [
        ("opensora2_image", 224, {"recompute": "none", "recompute_double_blocks": 0, "recompute_single_blocks": 0}),
        ("opensora2_stage1", 8, {}),  # 84 clips in a pack
        ("opensora2_stage3", 192, {"recompute": "none"}),
        ("opensora2_stage1", 4, {"recompute": "none", "recompute_double_blocks": 0, "recompute_single_blocks": 0}),
    ],
)
def test_the_cure_that_is_named_cures(recipe: str, gpus: int, parallel: dict[str, Any]) -> None:
    config = on_gpus(recipe, **parallel)
    (problem,) = problems(config, world_size=gpus)
    words = problem.cure.removeprefix("use ").partition(" (")[0].split()
    for flag, value in zip(words[::2], words[1::2], strict=True):
        section, name = flag.removeprefix("--").split(".")
        changes: dict[str, Any] = {name: int(value) if value.isdigit() else value}
        if name == "recompute":
            changes |= {"recompute_double_blocks": 0, "recompute_single_blocks": 0}
        config = replace(config, **{section: replace(getattr(config, section), **changes)})
    assert not problems(config, world_size=gpus)


def test_moments_below_fp32_are_halved_and_widened_for_the_step() -> None:
    """11.89 B parameters over 224 ranks: 12 bytes of master and moments each, 8 with both moments in two; while Adam steps 8 more."""
    config = on_gpus("opensora2_stage1")
    narrow = replace(config, optimizer=replace(config.optimizer, exp_avg_dtype="bf16", exp_avg_sq_dtype="fp16", eps=1e-8))
    wide, small = (memory_estimate(of, world_size=224) for of in (config, narrow))
    assert small.optimizer == pytest.approx(wide.optimizer * 8 / 12)
    assert wide.adam_copies == small.adam_copies == 0  # activations take more room, and are gone by then
    tiny = replace(narrow, data=replace(narrow.data, global_tokens=10_000))
    alone = memory_estimate(tiny, world_size=1)
    rest = alone.activations + alone.working_set + alone.workspace
    assert alone.adam_copies + rest == pytest.approx(max(rest, 8 * 11.89e9), rel=1e-3)


def test_offloaded_inputs_are_in_host_memory() -> None:
    """57 inputs of 38,272 x 3,072 bf16 numbers, 0.235 GB each: all but the last leave, and 256 MiB of the host are taken for each."""
    config, offloaded = on_gpus("opensora2_stage3"), on_gpus("opensora2_stage3", offload="inputs")
    kept, stays = (memory_estimate(of, world_size=192).activations for of in (config, offloaded))
    assert kept - stays == 56 * 38_272 * 3_072 * 2
    assert host_bytes(offloaded, world_size=192) == 56 * 2**28
    assert host_bytes(config, world_size=192) == 0


def test_zero_stages_share_out_one_part_after_another() -> None:
    """11.89 B parameters over 224: bf16 weights 23.8 GB, fp32 gradients 47.6 GB, then a 224th of each."""
    config = on_gpus("opensora2_stage1")
    stages = (replace(config, parallel=replace(config.parallel, zero_stage=stage)) for stage in (1, 2, 3))
    one, two, three = (memory_estimate(stage, world_size=224) for stage in stages)
    assert (one.weights / 1e9, one.gradients / 1e9) == pytest.approx((23.78, 47.57), abs=0.01)
    assert two.gradients == one.gradients / 224
    assert (two.weights, three.weights) == (one.weights, 0)  # the master's shard is all ZeRO-3 keeps
    assert one.total > two.total > three.total


def test_fp8_keeps_two_copies_of_the_block_linears() -> None:
    """11.89 B parameters without 3.23 B of modulation, a byte twice; biases and embedders are below 1 %."""
    config = on_gpus("opensora2_stage1")
    config = replace(config, precision=replace(config.precision, fp8="tensorwise"))
    assert memory_estimate(config, world_size=224).fp8_weights / 1e9 == pytest.approx(2 * (11.89 - 3.23), rel=0.01)
    assert memory_estimate(on_gpus("opensora2_stage1"), world_size=224).fp8_weights == 0


def test_the_fullest_stage_is_the_one_reported() -> None:
    """Equal FLOPs: the first stage has the double blocks (5.1 B parameters) and the most micro-batches in flight."""
    config = on_gpus("opensora2_stage1", pipeline_model_parallel_size=4, data={"num_microbatches": 8})
    estimate = memory_estimate(config, world_size=224)
    assert (estimate.stage, estimate.in_flight) == (0, 4)

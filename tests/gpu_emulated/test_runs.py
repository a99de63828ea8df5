"""Whole commands with `--device cuda`, on emulated GPUs: a restart is no restart, FP8 everywhere it should be, nothing else is called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megasora.checkpoint import store
from megasora.checkpoint.source import open_source
from megasora.config.io import load_yaml
from megasora.config.schema import ParallelConfig, RunConfig
from tests.gpu_emulated.runs import gpu_run, layout, sample_on_gpu, train_on_gpu
from tests.parallel.runs import metrics
from tests.pool import RankPool

STEPS = 12


def curve(run_dir: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in metrics(run_dir)]


@pytest.mark.parametrize(("fp8", "steps"), [("none", STEPS), ("tensorwise", 5)])
def test_a_restart_repeats_the_uninterrupted_run_to_the_bit(gpus: RankPool, tmp_path: Path, fp8: str, steps: int) -> None:
    """Ten steps after it, for a step that an optimizer counts wrongly shows late; FusedAdam counts in its parameter groups."""
    (calls,) = gpus.run(1, train_on_gpu, gpu_run(tmp_path / "straight", steps=steps, fp8=fp8))
    gpus.run(1, train_on_gpu, gpu_run(tmp_path / "restarted", steps=2, fp8=fp8, interval_steps=2))
    (after,) = gpus.run(1, train_on_gpu, gpu_run(tmp_path / "restarted", steps=steps, fp8=fp8))
    assert sorted(set(calls["adam"])) == list(range(1, steps + 1))
    assert sorted(set(after["adam"])) == list(range(3, steps + 1))
    assert curve(tmp_path / "restarted") == curve(tmp_path / "straight")
    assert len(curve(tmp_path / "straight")) == steps


def test_training_evaluation_and_sampling_run_every_block_product_in_fp8(gpus: RankPool, tmp_path: Path) -> None:
    config = gpu_run(tmp_path / "run", steps=2, fp8="tensorwise", eval_steps=2, interval_steps=2)
    config = replace(config, data=replace(config.data, text_tokens=15))  # rows that FP8 takes only with padding
    (calls,) = gpus.run(1, train_on_gpu, config)
    assert set(calls["gemm"]) == {"fp8"}
    assert {"attention_forward", "attention_backward"} <= calls.keys()
    assert [event["event"] for event in metrics(tmp_path / "run")[-1]["events"]] == ["eval", "checkpoint"]
    config = load_yaml(tmp_path / "run" / "config.yaml")  # names the encoders that the run made
    (calls,) = gpus.run(1, sample_on_gpu, config, tmp_path / "run" / "checkpoints" / "step_00000002", tmp_path / "clips")
    assert set(calls["gemm"]) == {"fp8"}
    assert sorted(path.suffix for path in (tmp_path / "clips").iterdir()) == [".json", ".mp4"]


def test_a_run_moves_between_emulated_gpus_and_the_cpu(gpus: RankPool, pool: RankPool, tmp_path: Path) -> None:
    """A checkpoint knows neither provider nor device: GPU (te, FusedAdam), then CPU (local, torch's Adam), then two GPUs in TP2."""
    from tests.parallel.runs import train_on_rank

    gpus.run(1, train_on_gpu, gpu_run(tmp_path / "run", steps=3, interval_steps=3))
    on_cpu = replace(gpu_run(tmp_path / "run", steps=6, interval_steps=3), device="cpu")
    pool.run(1, train_on_rank, on_cpu)
    tp2 = ParallelConfig(tensor_model_parallel_size=2)
    gpus.run(2, train_on_gpu, gpu_run(tmp_path / "run", steps=9, parallel=tp2))
    gpus.run(1, train_on_gpu, gpu_run(tmp_path / "straight", steps=9))
    for (loss, norm), (expected, expected_norm) in zip(curve(tmp_path / "run"), curve(tmp_path / "straight"), strict=True):
        assert loss == pytest.approx(expected, rel=2.0**-8)  # bf16
        assert norm == pytest.approx(expected_norm, rel=2.0**-5)


def test_delayed_scaling_refuses_to_train(tmp_path: Path) -> None:
    """Its scales are state that a checkpoint does not hold: the step after a restart would have gradients far off."""
    from megasora.config.validate import problems

    config: RunConfig = gpu_run(tmp_path / "run", steps=2, fp8="delayed")
    found = [problem for problem in problems(config, world_size=1) if problem.field == "precision.fp8"]
    assert len(found) == 1
    assert "checkpoint" in found[0].message
    assert "tensorwise" in found[0].cure


@pytest.mark.parametrize(("world_size", "sizes"), [(2, {}), (4, {"pp": 2, "vp": 2})], ids=["dp2", "pp2 vp2 dp2"])
def test_overlapped_messages_change_no_bit(gpus: RankPool, tmp_path: Path, world_size: int, sizes: dict[str, int]) -> None:
    """Sums of two replicas do not depend on who adds; on GPUs both overlaps are on by themselves."""
    curves = []
    for name, overlap in (("on", None), ("off", False)):
        parallel = layout(**sizes, overlap_grad_reduce=overlap, overlap_param_gather=overlap)
        config = gpu_run(tmp_path / name, steps=5, parallel=parallel, interval_steps=2)
        config = replace(config, model=replace(config.model, num_single_blocks=3))
        gpus.run(world_size, train_on_gpu, config)
        curves.append(curve(tmp_path / name))
    assert curves[0] == curves[1]
    assert len(curves[0]) == 5
    paths = [store.step_folder(tmp_path / name / "checkpoints", 4) for name in ("on", "off")]
    one, other = (open_source(path, select="ema") for path in paths)
    assert all(torch.equal(one.read(key), other.read(key)) for key in one.shapes)


def test_encoding_ahead_changes_no_bit(gpus: RankPool, tmp_path: Path) -> None:
    """On GPUs it is on by itself."""
    for name, ahead in (("on", None), ("off", False)):
        config = gpu_run(tmp_path / name, steps=4)
        gpus.run(1, train_on_gpu, replace(config, data=replace(config.data, encode_ahead=ahead)))
    assert curve(tmp_path / "on") == curve(tmp_path / "off")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fp8", "recompute"),
    [(2, "none", "full"), (3, "none", "full"), (2, "tensorwise", "none"), (3, "tensorwise", "full"), (3, "blockwise", "selective")],
)
def test_a_fully_sharded_run_repeats_zero_1_and_restarts_to_the_bit(
    gpus: RankPool, tmp_path: Path, stage: int, fp8: str, recompute: str
) -> None:
    """Transformer Engine's layers on gathered bf16 weights; FusedAdam on rows of fp32. In FP8 the layers quantise what was gathered, once a
    step (their copies stay from micro-batch to micro-batch): a copy that outlived a step would show in the losses."""

    def config(name: str, zero_stage: int, steps: int) -> RunConfig:
        parallel = ParallelConfig(zero_stage=zero_stage, recompute=recompute)  # type: ignore[arg-type]
        config = gpu_run(tmp_path / name, steps=steps, parallel=parallel, fp8=fp8)
        return replace(config, data=replace(config.data, num_microbatches=2))

    steps = 6
    gpus.run(2, train_on_gpu, config("zero1", 1, 4))
    (calls, _) = gpus.run(2, train_on_gpu, config("straight", stage, steps))
    assert sorted(set(calls["adam"])) == list(range(1, steps + 1))
    assert set(calls["gemm"]) == {"bf16" if fp8 == "none" else "fp8"}
    gpus.run(2, train_on_gpu, config("restarted", stage, 2))
    gpus.run(2, train_on_gpu, config("restarted", stage, steps))
    assert curve(tmp_path / "restarted") == curve(tmp_path / "straight")
    for (loss, norm), (expected, expected_norm) in zip(curve(tmp_path / "straight"), curve(tmp_path / "zero1"), strict=False):
        assert loss == pytest.approx(expected, rel=2.0**-8)  # bf16
        assert norm == pytest.approx(expected_norm, rel=2.0**-5)

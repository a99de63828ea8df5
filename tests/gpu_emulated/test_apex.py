"""apex installed, Transformer Engine not: Megatron-core 0.16.1 then takes apex's FusedAdam and could take its fused weight gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megasora.config.errors import UserError
from megasora.config.schema import OptimizerConfig, PrecisionConfig, RunConfig
from tests.gpu_emulated.layouts import Case, one_step
from tests.gpu_emulated.runs import gpu_run, train_on_gpu
from tests.gpu_emulated.test_layers import all_together, layout, reference
from tests.parallel.runs import metrics, train_on_rank
from tests.pool import RankFailedError, RankPool

STEPS = 12


def what_megatron_took(rank: int) -> dict[str, Any]:
    """Where Megatron's Adam comes from, and whether it found the extension of the fused weight gradient."""
    from megatron.core import optimizer
    from megatron.core.tensor_parallel import layers

    return {"adam": optimizer.Adam.__module__, "extension": layers._grad_accum_fusion_available}


def curve(run_dir: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in metrics(run_dir)]


def test_megatron_takes_apex_where_transformer_engine_is_missing(apex_gpus: RankPool) -> None:
    """Or the tests below would show nothing."""
    assert apex_gpus.run(1, what_megatron_took) == [{"adam": "tests.gpu_emulated.apex", "extension": True}]


def test_a_restart_counts_on_in_the_parameter_groups(apex_gpus: RankPool, tmp_path: Path) -> None:
    """Ten steps after it, for a step that an optimizer counts wrongly shows late."""
    (calls,) = apex_gpus.run(1, train_on_gpu, gpu_run(tmp_path / "straight", steps=STEPS))
    apex_gpus.run(1, train_on_gpu, gpu_run(tmp_path / "restarted", steps=2, interval_steps=2))
    (after,) = apex_gpus.run(1, train_on_gpu, gpu_run(tmp_path / "restarted", steps=STEPS))
    assert sorted(set(calls["adam"])) == list(range(1, STEPS + 1))
    assert sorted(set(after["adam"])) == list(range(3, STEPS + 1))
    assert curve(tmp_path / "restarted") == curve(tmp_path / "straight")
    assert len(curve(tmp_path / "straight")) == STEPS


def test_a_checkpoint_of_torchs_adam_goes_on_with_apexs(apex_gpus: RankPool, pool: RankPool, tmp_path: Path) -> None:
    """One counts for each parameter, the other for each group; a checkpoint knows neither.

    fp32 and an eps above the rounding of a gradient that should be zero, which the recipe's 1e-15 makes a whole step of the learning rate
    in a direction that depends on how memory is aligned.
    """

    def run(folder: Path, steps: int, device: str) -> RunConfig:
        config = gpu_run(folder, steps=steps, interval_steps=3)
        optimizer = replace(config.optimizer, eps=1e-6)
        return replace(config, device=device, precision=PrecisionConfig(dtype="fp32"), optimizer=optimizer)  # type: ignore[arg-type]

    pool.run(1, train_on_rank, run(tmp_path / "run", 3, "cpu"))
    (calls,) = apex_gpus.run(1, train_on_gpu, run(tmp_path / "run", STEPS, "cuda"))
    pool.run(1, train_on_rank, run(tmp_path / "straight", STEPS, "cpu"))
    assert sorted(set(calls["adam"])) == list(range(4, STEPS + 1))
    for (loss, norm), (expected, expected_norm) in zip(curve(tmp_path / "run"), curve(tmp_path / "straight"), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize("tp", [1, 2])
def test_local_layers_never_take_the_fused_weight_gradient(apex_gpus: RankPool, gpus: RankPool, tp: int) -> None:
    """It is there and would be taken if it were asked for; `one_step` refuses a configuration that asks. In fp32 gradients are exact."""
    case = Case(parallel=layout(tp=tp), precision=PrecisionConfig(dtype="fp32", attention="torch"))
    step = apex_gpus.run(tp, one_step, case)[0]
    assert all_together(step, reference(gpus)) < 1e-5
    assert apex_gpus.run(tp, kinds_called) == [set()] * tp


def kinds_called(rank: int) -> set[str]:
    """What the last job called in the stand-ins, beside Adam."""
    from tests.gpu_emulated.extension import CALLS

    return {call.kind for call in CALLS} - {"adam"}


@pytest.mark.parametrize(
    ("precision", "cure"),
    [
        (PrecisionConfig(dtype="bf16", provider="te"), "Transformer Engine"),
        (PrecisionConfig(dtype="bf16", fp8="tensorwise"), "te"),
        (PrecisionConfig(dtype="bf16", attention="te"), "Transformer Engine"),
    ],
)
def test_what_needs_transformer_engine_is_refused_in_one_line(apex_gpus: RankPool, precision: PrecisionConfig, cure: str) -> None:
    """apex stands in for its optimizer only."""
    with pytest.raises(RankFailedError) as refused:
        apex_gpus.run(1, one_step, Case(precision=precision))
    last = str(refused.value).strip().splitlines()[-1]
    assert "UserError" in last and cure in last and "--precision" in last


def test_training_on_the_cpu_beside_a_fused_adam_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-core takes FusedAdam for whatever device, and its kernels take CUDA tensors only."""
    from megasora.training import optimizer

    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    with pytest.raises(UserError, match=r"takes the FusedAdam of .*; train with --device cuda, or on the CPU") as refused:
        optimizer.build_optimizer([nn.Linear(2, 2)], optimizer=OptimizerConfig(), dtype=torch.float32)  # type: ignore[list-item]
    assert "\n" not in str(refused.value)

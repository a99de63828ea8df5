"""Which GPU a rank takes, and what it refuses, without one."""

from __future__ import annotations

import pytest
import torch

from megasora.config.errors import UserError
from megasora.models.mmdit import build
from megasora.parallel import groups
from megasora.parallel.determinism import use_deterministic_algorithms

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, **environment: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_rank_takes_the_gpu_of_its_local_number(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 8, LOCAL_RANK="5")
    assert groups.choose_device("auto") == torch.device("cuda", 5)
    with_gpus(monkeypatch, 8, SLURM_LOCALID="3")
    assert groups.choose_device("cuda") == torch.device("cuda", 3)


def test_a_task_that_sees_one_gpu_takes_it_whatever_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun --gpus-per-task 1 shows each task its own GPU as number 0."""
    with_gpus(monkeypatch, 1, SLURM_LOCALID="3")
    assert groups.choose_device("cuda") == torch.device("cuda", 0)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2, LOCAL_RANK="2")
    with pytest.raises(UserError, match="local rank 2 has no GPU: 2 are visible; start at most 2 ranks"):
        groups.choose_device("auto")


def test_determinism_on_cuda_asks_for_what_cublas_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    use_deterministic_algorithms(CPU)
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        use_deterministic_algorithms(CUDA)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    use_deterministic_algorithms(CUDA)
    assert asked == [True, True]


def test_layers_in_fp32_are_local_on_cuda_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine multiplies fp32 matrices in TF32, which a parity check would take for a mistake."""
    monkeypatch.setattr(build, "_installed", lambda package: True)
    assert build.choose_provider("auto", device=CUDA, dtype=torch.bfloat16) == "te"
    assert build.choose_provider("auto", device=CUDA, dtype=torch.float32) == "local"
    assert build.choose_provider("te", device=CUDA, dtype=torch.float32) == "te"
    assert build.choose_provider("auto", device=CPU, dtype=torch.bfloat16) == "local"

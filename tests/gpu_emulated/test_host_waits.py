"""Nothing of ours makes the host wait for the GPU inside a step."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megasora.config.schema import RunConfig
from tests.gpu_emulated.memory import HostWait, watch
from tests.gpu_emulated.runs import gpu_run, layout, train_on_gpu
from tests.pool import RankFailedError, RankPool

STEPS = 3


@dataclass(frozen=True, kw_only=True)
class StepWaits:
    """What the host waited for in one step of a rank."""

    within: list[HostWait]
    """From the first micro-batch to the updated weights."""
    before: list[HostWait]
    """Since the step before: clips, micro-batches, metrics."""


def train_watched(rank: int, config: RunConfig) -> list[StepWaits]:
    """One rank of a run."""
    from megasora.training import diffusion, run

    steps: list[StepWaits] = []
    real = diffusion.train_step
    with watch() as memory:

        def step(*args: Any, **kwargs: Any) -> Any:
            before, memory.waits = memory.waits, []
            result = real(*args, **kwargs)
            steps.append(StepWaits(within=memory.waits, before=before))
            memory.waits = []
            return result

        diffusion.train_step = step
        try:
            run.train(config)
        finally:
            diffusion.train_step = real
    return steps


LAYOUTS = {
    "one rank, recompute, offload": (1, layout(recompute="full", offload="inputs")),
    "dp2, moments below fp32": (2, layout()),
    "pp2": (2, layout(pp=2)),
    "pp2 vp2, recompute, offload": (2, layout(pp=2, vp=2, recompute="full", offload="inputs")),
    "cp2 ulysses": (2, layout(cp=2, context_parallel_backend="ulysses")),
    "tp2 cp2 ring, recompute": (4, layout(tp=2, cp=2, context_parallel_backend="ring", recompute="full")),
}
ALLOWED = {
    "training/step.py:_agree": "loss, counts and times of all ranks in one copy: a loss that is not finite stops the run",
    "core/distributed/finalize_model_grads.py:finalize_model_grads": "Megatron divides by the samples if there are any",
    "core/optimizer/clip_grads.py:get_grad_norm_fp32": "Megatron's gradient norm, which is logged too",
}
"""Function -> why a step may wait there, once (for each chunk of the model)."""
ONCE_A_CHUNK = "core/distributed/finalize_model_grads.py:finalize_model_grads"
BETWEEN = {"training/feed.py:_weights": "which clips failed anywhere in the replica, in one copy: their weights are numbers of the plan"}


@pytest.fixture(scope="module")
def assets(gpus: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips and encoders that all runs share."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    gpus.run(1, train_on_gpu, gpu_run(run_dir, steps=1))
    return run_dir / "assets"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_waits_only_where_it_must(gpus: RankPool, assets: Path, tmp_path: Path, name: str) -> None:
    """After the first step, in which libraries prepare themselves."""
    world_size, parallel = LAYOUTS[name]
    shutil.copytree(assets, tmp_path / "run" / "assets")
    config = gpu_run(tmp_path / "run", steps=STEPS, parallel=parallel)
    config = replace(config, model=replace(config.model, num_single_blocks=3))
    if "moments" in name:
        config = replace(config, optimizer=replace(config.optimizer, eps=1e-8, exp_avg_dtype="bf16", exp_avg_sq_dtype="fp16"))
    for steps in gpus.run(world_size, train_watched, config):
        for step in steps[1:]:
            unexpected = sorted({f"{wait.where} ({wait.package}): {wait.what}" for wait in step.within if wait.function not in ALLOWED})
            assert not unexpected, "\n".join(unexpected)
            counted = Counter(wait.function for wait in step.within)
            assert counted == {**dict.fromkeys(ALLOWED, 1), ONCE_A_CHUNK: parallel.num_model_chunks}
            assert Counter(wait.function for wait in step.before) == dict.fromkeys(BETWEEN, 1)


def read_and_copy(rank: int) -> list[list[str]]:
    """What is logged for each of these, all of which CUDA would make the host wait for or not."""
    logged: list[list[str]] = []
    with watch() as memory:
        on_gpu = torch.arange(4.0, device="cuda")
        pinned = torch.zeros(4).pin_memory()
        calls: list[Callable[[], object]] = [
            lambda: on_gpu.sum().item(),
            lambda: float(on_gpu[0]),
            lambda: bool(on_gpu[0] > 1),
            lambda: on_gpu.tolist(),
            lambda: on_gpu.cpu(),
            lambda: on_gpu.to("cpu", non_blocking=True),
            lambda: on_gpu.nonzero(),
            lambda: on_gpu[on_gpu > 1],
            lambda: on_gpu[torch.tensor([1, 2])],
            lambda: torch.zeros(4).to("cuda"),
            lambda: torch.zeros(4).to("cuda", non_blocking=True),
            lambda: pinned.to("cuda"),
            lambda: on_gpu.copy_(torch.zeros(4)),
            lambda: torch.zeros(4).copy_(on_gpu, non_blocking=True),
            lambda: pinned.copy_(on_gpu),
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: torch.cuda.synchronize(),
        ]
        free: list[Callable[[], object]] = [
            lambda: pinned.to("cuda", non_blocking=True),
            lambda: on_gpu.copy_(pinned, non_blocking=True),
            lambda: pinned.copy_(on_gpu, non_blocking=True),
            lambda: on_gpu[on_gpu.long().clamp(max=3)],
            lambda: torch.full((), 3, device=on_gpu.device) * on_gpu,
            lambda: pinned.sum().item() + torch.zeros(4).nonzero().numel(),
            lambda: torch.where(on_gpu > 1, on_gpu, 0.0),
        ]
        for call in (*calls, *free):
            memory.waits = []
            call()
            logged.append([wait.what for wait in memory.waits])
    return [logged[: len(calls)], logged[len(calls) :]]  # type: ignore[list-item]


def test_the_emulated_memory_sees_what_waits(gpus: RankPool) -> None:
    """Each of these lines is named by torch.cuda.set_sync_debug_mode or by the CUDA runtime's rules of copies."""
    ((waiting, free),) = gpus.run(1, read_and_copy)
    assert [len(waits) for waits in waiting] == [1] * len(waiting), waiting
    assert free == [[]] * len(free)


def meet(rank: int) -> None:
    """A product of a tensor of the host and one of the device."""
    with watch():
        torch.ones(3) * torch.ones(3, device="cuda")


def test_the_emulated_memory_refuses_operands_of_two_devices(gpus: RankPool) -> None:
    with pytest.raises(RankFailedError, match="on the host and on the device"):
        gpus.run(1, meet)

"""Adam's moments below fp32, by Transformer Engine's own FusedAdam: what is kept, and that a restart changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megasora.config.errors import UserError
from megasora.config.schema import OptimizerConfig, RunConfig
from tests.gpu_emulated.runs import gpu_run, layout, train_on_gpu
from tests.gpu_emulated.test_runs import curve
from tests.pool import RankPool

STEPS = 6
LARGEST = 32752.0
"""Half of fp16's range, 65504: what FusedAdam scales the largest of a run's moments to."""
NARROW = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp16"}


def narrow_run(run_dir: Path, *, steps: int, formats: dict[str, str] | None = None, **more: Any) -> RunConfig:
    config = gpu_run(run_dir, steps=steps, **more)
    formats = NARROW if formats is None else formats
    return replace(config, optimizer=replace(config.optimizer, eps=1e-8, **formats))  # type: ignore[arg-type]


def train_and_look(rank: int, config: RunConfig) -> dict[str, set[torch.dtype]]:
    """Formats of the moments and masters at the end of a run."""
    from megasora.training import diffusion, optimizer

    kept: list[Any] = []
    real = diffusion.train_step

    def step(trainee: Any, *args: Any, **kwargs: Any) -> Any:
        kept[:] = [trainee]
        return real(trainee, *args, **kwargs)

    with mock.patch.object(diffusion, "train_step", step):
        train_on_gpu(rank, config)
    shards = list(optimizer.owned_shards(kept[0].optimizer))
    found = {name: {shard.state[name].dtype for shard in shards} for name in ("exp_avg", "exp_avg_sq")}
    return {**found, "master": {shard.master.dtype for shard in shards}}


@pytest.mark.parametrize(("world_size", "more"), [(1, {}), (2, {"parallel": layout(zero_stage=3)})], ids=["zero 1", "zero 3, dp2"])
def test_a_restart_repeats_the_uninterrupted_run_to_the_bit(gpus: RankPool, tmp_path: Path, world_size: int, more: dict[str, Any]) -> None:
    found = gpus.run(world_size, train_and_look, narrow_run(tmp_path / "straight", steps=STEPS, **more))
    assert found[0] == {"exp_avg": {torch.bfloat16}, "exp_avg_sq": {torch.float16}, "master": {torch.float32}}
    gpus.run(world_size, train_on_gpu, narrow_run(tmp_path / "restarted", steps=2, **more))
    gpus.run(world_size, train_on_gpu, narrow_run(tmp_path / "restarted", steps=STEPS, **more))
    assert curve(tmp_path / "restarted") == curve(tmp_path / "straight")
    assert len(curve(tmp_path / "straight")) == STEPS


def test_a_run_goes_on_in_another_format_and_layout(gpus: RankPool, tmp_path: Path) -> None:
    """fp32, then narrow on two ranks in TP2, then fp32 again; beside a run in fp32 alone."""
    fp32 = dict.fromkeys(NARROW, "fp32")
    gpus.run(1, train_on_gpu, narrow_run(tmp_path / "run", steps=2, formats=fp32))
    gpus.run(2, train_on_gpu, narrow_run(tmp_path / "run", steps=4, parallel=layout(tp=2)))
    gpus.run(1, train_on_gpu, narrow_run(tmp_path / "run", steps=6, formats=fp32))
    gpus.run(1, train_on_gpu, narrow_run(tmp_path / "straight", steps=6, formats=fp32))
    for (loss, norm), (expected, expected_norm) in zip(curve(tmp_path / "run"), curve(tmp_path / "straight"), strict=True):
        assert loss == pytest.approx(expected, rel=2.0**-8)  # bf16
        assert norm == pytest.approx(expected_norm, rel=2.0**-5)


def steps_of_adam(rank: int, formats: dict[str, str], count: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Parameter, both moments (widened) and the scale of the second after some steps on gradients of many sizes."""
    from megatron.core.optimizer import Adam

    from megasora.training.moments import moment_formats, moments_of
    from megasora.training.owned_shard import OwnedShard

    settings = OptimizerConfig(lr=1e-2, beta2=0.99, eps=1e-8, **formats)  # type: ignore[arg-type]
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 33))
    adam: Any = Adam(
        [parameter], lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, adam_w_mode=True, **moment_formats(settings)
    )
    for number in range(count):
        parameter.grad = gradient(number)
        adam.step()
    shard = OwnedShard(
        parameter=parameter,
        start=0,
        stop=33,
        master=parameter,
        state=adam.state[parameter],
        adam=adam,
        counts_steps=False,
        dtype=torch.float32,
    )
    (moments,) = moments_of([shard])
    scale = float(adam._scales[parameter]["exp_avg_sq"]) if formats.get("exp_avg_sq_dtype") == "fp16" else 1.0
    return parameter.detach(), moments["exp_avg"], moments["exp_avg_sq"], scale


def gradient(step: int) -> Tensor:
    """Sizes from 1 to 1e-4."""
    return torch.sin(torch.arange(33.0) * (step + 1)) * torch.logspace(0, -4, 33)


def narrowed(values: Tensor, kind: str) -> Tensor:
    """Rounded to the format; fp16 scaled so that the largest is half of its range, all in fp64 but for the rounding itself."""
    if kind == "fp16":
        scale = values.abs().max() / LARGEST
        return (values / scale).half().double() * scale
    return values.bfloat16().double() if kind == "bf16" else values.float().double()


@pytest.mark.parametrize("formats", [NARROW, {"exp_avg_dtype": "fp16", "exp_avg_sq_dtype": "bf16"}, {"exp_avg_sq_dtype": "bf16"}])
def test_the_update_is_adams_with_moments_rounded_between_steps(gpus: RankPool, formats: dict[str, str]) -> None:
    """AdamW (Loshchilov and Hutter, algorithm 2) in fp64 whose moments are rounded at the end of each step."""
    count = 7
    ((found, mean, square, _),) = gpus.run(1, steps_of_adam, formats, count)
    parameter, m, v = torch.linspace(-1, 1, 33).double(), torch.zeros(33).double(), torch.zeros(33).double()
    for number in range(count):
        g = gradient(number).double()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        parameter -= 1e-2 * (m / (1 - 0.9 ** (number + 1))) / ((v / (1 - 0.99 ** (number + 1))).sqrt() + 1e-8)
        m, v = narrowed(m, formats.get("exp_avg_dtype", "fp32")), narrowed(v, formats.get("exp_avg_sq_dtype", "fp32"))
    torch.testing.assert_close(mean.double(), m, rtol=2.0**-8, atol=0)  # a value between two of the format may go either way
    torch.testing.assert_close(square.double(), v, rtol=2.0**-8, atol=0)
    torch.testing.assert_close(found.double(), parameter, rtol=0, atol=7 * 1e-2 * 2.0**-8)
    assert not torch.equal(found, torch.linspace(-1, 1, 33))


def narrow_again(rank: int, scales: list[float]) -> list[float]:
    """Scales of fp16 moments that did not come out to the bit after widening and narrowing."""
    from megatron.core.optimizer import Adam

    from megasora.training.moments import moment_formats, moments_of, set_moments
    from megasora.training.owned_shard import OwnedShard

    generator, wrong = torch.Generator().manual_seed(0), []
    settings = OptimizerConfig(exp_avg_dtype="fp16", exp_avg_sq_dtype="fp16", eps=1e-8)
    for scale in scales:
        parameter = torch.nn.Parameter(torch.zeros(50))
        adam: Any = Adam([parameter], **moment_formats(settings))
        adam.initialize_state(parameter, False)
        state = adam.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            values = torch.rand(50, generator=generator) * 10.0 ** (-11 * torch.rand(50, generator=generator))
            state[name].copy_(values * LARGEST)
            state[name][0] = LARGEST
            adam._scales[parameter][name].fill_(scale)
        shard = OwnedShard(
            parameter=parameter, start=0, stop=50, master=parameter, state=state, adam=adam, counts_steps=False, dtype=torch.float32
        )
        (before,) = moments_of([shard])
        set_moments([shard], [before])
        (after,) = moments_of([shard])
        if any(not torch.equal(before[name], after[name]) for name in before):
            wrong.append(scale)
    return wrong


def test_widened_moments_narrow_to_the_same_bits(gpus: RankPool) -> None:
    """Also where the scale is another after largest = range x scale and largest / range, each rounded: 7 of 10,000 scales."""
    scales = (torch.rand(50_000, generator=torch.Generator().manual_seed(1)) + 1) * 2.0**-20
    moved = scales[scales * LARGEST / LARGEST != scales].tolist()
    assert len(moved) > 20
    (wrong,) = gpus.run(1, narrow_again, [*scales[:50].tolist(), *moved])
    assert wrong == []


def build_narrow(rank: int) -> None:
    """What a build of the optimizer asks for."""
    from megasora.training.moments import moment_formats

    moment_formats(OptimizerConfig(exp_avg_dtype="bf16"))


def test_another_adam_is_refused_with_the_cure(pool: RankPool, apex_gpus: RankPool) -> None:
    """torch's, and apex's."""
    for ranks in (pool, apex_gpus):
        with pytest.raises(Exception, match="install Transformer Engine, or use fp32") as raised:
            ranks.run(1, build_narrow)
        assert UserError.__name__ in str(raised.value)

"""What validate says of an autoencoder's run is what its ranks allocate in a step, within 5 %."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from megasora import recipes
from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.dc_ae import DCAEConfig
from megasora.config.distillation import DistillationConfig
from megasora.config.schema import ParallelConfig
from megasora.data.plan import SamplerState, StepPlan
from megasora.models.lpips import Lpips, expected_shapes
from megasora.parallel import groups
from megasora.perf.allocations import Allocations
from megasora.scaling.autoencoder_memory import Clip, autoencoder_memory, memory_problem
from megasora.training.autoencoder.backward import ClipDraws
from megasora.training.autoencoder.feed import ClipBatch, OwnClip
from megasora.training.autoencoder.start import AutoencoderStart
from megasora.training.autoencoder.step import autoencoder_step
from megasora.training.autoencoder.trainer import build_autoencoder_trainee
from megasora.training.guard import Guard
from tests.pool import RankPool
from tests.unit.models.autoencoders.test_tiling import tiny_vae

CLOSE = 0.05
SIZES = DCAEConfig(
    widths=(16, 32, 64),
    encoder_depths=(1, 1, 1),
    decoder_depths=(1, 1, 1),
    attention_from=2,
    temporal_stages=(0, 1),
    latent_channels=16,
    head_dim=16,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run and its largest clip."""

    ranks: int = 1
    clip: Clip = (8, 32, 32)
    kind: str = "dc-ae"
    lpips: bool = False
    adversarial: bool = True
    recompute: str = "none"
    context_parallel_size: int = 1
    axis: str = "height"
    dtype: str = "fp32"
    batch_size: int = 1
    taught: str | None = None
    """Layer that is aligned with a teacher's features, and what is trained."""


CASES = {
    "keep all": Case(),
    "recompute, no discriminator": Case(recompute="stages", adversarial=False, clip=(16, 32, 32)),
    "lpips": Case(lpips=True, clip=(8, 48, 48)),
    "bf16": Case(dtype="bf16"),
    "2 replicas, 3 clips": Case(ranks=2, batch_size=3),
    "2 share rows": Case(ranks=2, context_parallel_size=2, clip=(8, 48, 32)),
    "3 share frames": Case(ranks=3, context_parallel_size=3, axis="time", recompute="stages", clip=(16, 32, 32)),
    "taught stage": Case(taught="stages.1 all", clip=(8, 64, 64)),
    "taught latent, encoder alone": Case(taught="latent encoder", adversarial=False, recompute="stages", clip=(16, 64, 64)),
    "hunyuan": Case(kind="hunyuan", clip=(5, 64, 32)),
    "hunyuan, 2 share rows, recompute": Case(kind="hunyuan", ranks=2, context_parallel_size=2, recompute="stages", clip=(9, 64, 64)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """HunyuanVideo's autoencoder, small."""
    path = tmp_path_factory.mktemp("vae") / "vae"
    tiny_vae().save_pretrained(path)
    return str(path)


def distillation_of(case: Case, folder: str) -> DistillationConfig:
    if case.taught is None:
        return DistillationConfig()
    layer, trained = case.taught.split()
    teacher = Path(folder).parent / "teacher"
    if not teacher.exists():  # a tenth of all that the rank holds
        Dinov2Model(Dinov2Config(hidden_size=256, num_hidden_layers=3, num_attention_heads=4, image_size=56)).save_pretrained(str(teacher))
    return DistillationConfig(weight=0.5, teacher=str(teacher), layer=layer, trained=trained, projector="mlp", projector_width=512)  # type: ignore[arg-type]


def config_of(case: Case, folder: str) -> AutoencoderRunConfig:
    base = recipes.get_autoencoder("tiny_ae" if case.kind == "dc-ae" else "hunyuan_vae_finetune")
    changes: dict[str, Any] = {"sizes": SIZES} if case.kind == "dc-ae" else {}
    return replace(
        base,
        device="cpu",
        autoencoder=replace(base.autoencoder, recompute=case.recompute, **changes),  # type: ignore[arg-type]
        loss=replace(base.loss, lpips=None, lpips_weight=0.5 if case.lpips else 0.0),
        discriminator=replace(base.discriminator, weight=0.05 * case.adversarial, start_step=0, width=16, num_layers=2, dropout=0.3),
        precision=replace(base.precision, dtype=case.dtype),  # type: ignore[arg-type]
        parallel=replace(base.parallel, context_parallel_size=case.context_parallel_size, context_parallel_axis=case.axis),  # type: ignore[arg-type]
        data=replace(base.data, batch_size=case.batch_size),
        distillation=distillation_of(case, folder),
        init=replace(base.init, weights=folder if case.kind == "hunyuan" else None),
    )


def allocated_on_rank(rank: int, case: Case, config: AutoencoderRunConfig) -> int:
    """Most bytes at once in a step, of all that there is on the rank."""
    layout = ParallelConfig(context_parallel_size=case.context_parallel_size)
    context = groups.initialize(layout, device=torch.device("cpu"), num_attention_heads=1, seed=0)
    with Allocations([]) as counted:
        trainee = build_autoencoder_trainee(config, context=context, start=AutoencoderStart(fresh=True))
        if case.lpips:
            trainee.lpips = Lpips("vgg", {name: torch.full(shape, 0.01) for name, shape in expected_shapes("vgg").items()}).distance
        if trainee.distillation is not None and trainee.distillation.teacher is not None:
            for parameter in trainee.distillation.teacher.model.parameters():
                parameter.detach()  # what was read from a file no operation has made
        clips = [
            OwnClip(
                name=str(number),
                sample=number,
                shape=case.clip,
                decoder=number % context.replica.size(),
                levels=torch.randint(256, (3, *case.clip), dtype=torch.uint8) if number % context.replica.size() == context.at.cp else None,
                draws=ClipDraws(posterior=number, patches=number),
            )
            for number in range(context.at.dp, case.batch_size, context.topology.dp)
        ]
        plan = StepPlan(position=SamplerState(), samples=(), state_after=SamplerState())
        batch = ClipBatch(plan=plan, clips=tuple(clips), frames=0, images=0, wait_s=0.0)
        counted.peak = 0
        result = autoencoder_step(trainee, batch, config=config, context=context, guard=Guard(config.guard), stop=False)
    assert result.problem is None or case.dtype == "bf16"  # whose gradients of small Conv3d are not finite in torch's CPU kernels
    assert result.counted == case.batch_size
    return counted.peak


@pytest.mark.parametrize("name", CASES)
def test_a_rank_allocates_what_the_estimate_says(pool: RankPool, folder: str, name: str) -> None:
    case = CASES[name]
    config = config_of(case, folder)
    found = pool.run(case.ranks, allocated_on_rank, case, config)[0]
    told = replace(config, loss=replace(config.loss, lpips="vgg" if case.lpips else None))
    expected = autoencoder_memory(told, world_size=case.ranks, clip=case.clip)
    assert expected is not None
    assert expected.total == pytest.approx(found, rel=CLOSE), expected.parts()


def test_what_does_not_fit_is_told_the_first_change_that_does(folder: str) -> None:
    config = config_of(Case(adversarial=False), folder)
    estimate = autoencoder_memory(config, world_size=2, clip=(32, 64, 64))
    shared = autoencoder_memory(
        replace(config, parallel=replace(config.parallel, context_parallel_size=2)), world_size=2, clip=(32, 64, 64)
    )
    assert estimate is not None and shared is not None
    assert memory_problem(config, estimate, world_size=2, gpu_bytes=estimate.total) is None
    for room, cure in ((estimate.total - 1, "--autoencoder.recompute stages ("), (1, "smaller or shorter clips")):
        problem = memory_problem(config, estimate, world_size=2, gpu_bytes=room)
        assert problem is not None and cure in problem.cure
    recomputed = replace(config, autoencoder=replace(config.autoencoder, recompute="stages"))
    problem = memory_problem(recomputed, estimate, world_size=2, gpu_bytes=shared.total)
    assert problem is not None and problem.cure.startswith("use --parallel.context_parallel_size 2 (")

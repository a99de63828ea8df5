"""Loss curves of a small MMDiT on fixed clips: the same weights, noise and times in every precision, so they differ by rounding only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megasora.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megasora.diffusion.flow import training_time
from megasora.diffusion.philox import Stream, key_of, normal
from megasora.models.mmdit.build import build_chunks
from megasora.models.mmdit.initialization import initialize_weights
from megasora.models.mmdit.megatron_config import FP8_ROW_MULTIPLE
from megasora.models.mmdit.schedule import MicroBatch, run_schedule
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape
from megasora.training.microbatch import TrainingSample, build_microbatch, velocity_loss
from megasora.training.optimizer import build_optimizer, ensure_adam_state, refresh_masters, wrap_for_training

MODEL = ModelConfig(
    hidden_size=128,
    num_attention_heads=4,
    num_double_blocks=2,
    num_single_blocks=4,
    ffn_hidden_size=512,
    in_channels=16,
    patch_size=2,
    text_dim=32,
    vec_dim=16,
    time_dim=32,
    cond_embed=False,
    axes_dim=(8, 12, 12),
)
OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_steps=0, eps=1e-8, ema_decay=0.0)
SHAPES = (
    SampleShape(text_tokens=8, grid=(3, 4, 4)),
    SampleShape(text_tokens=5, grid=(1, 6, 6)),
    SampleShape(text_tokens=7, grid=(4, 3, 4)),
    SampleShape(text_tokens=4, grid=(2, 5, 4)),
)
SEED = 11


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What stays the same from step to step."""

    tokens: torch.Tensor
    text: torch.Tensor
    vec: torch.Tensor


def clips(seed: int = SEED) -> list[Clip]:
    """Four clips whose tokens change smoothly along the sequence, so that there is something to learn beside their mean."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in SHAPES:
        steps = torch.randn(shape.video_tokens, MODEL.in_channels, generator=generator)
        walk = steps.cumsum(0)
        found.append(
            Clip(
                tokens=(walk - walk.mean()) / walk.std(),
                text=torch.randn(shape.text_tokens, MODEL.text_dim, generator=generator),
                vec=torch.randn(MODEL.vec_dim, generator=generator),
            )
        )
    return found


def batches(steps: int, *, fp8: str, dtype: torch.dtype, device: torch.device, seed: int = SEED) -> Iterator[MicroBatch]:
    """One pack of all clips a step; noise and time are functions of (clip, step), as in a run."""
    pack = Pack(list(SHAPES), split=PackSplit(row_multiple=FP8_ROW_MULTIPLE[fp8]), device=device)
    fixed = clips(seed)
    for step in range(steps):

        def key(stream: Stream, clip: int, step: int = step) -> int:
            return key_of(seed=seed, stream=stream, epoch=0, sample=clip, step=step)

        samples = [
            TrainingSample(
                tokens=clip.tokens,
                text=clip.text,
                vec=clip.vec,
                cond=None,
                t=training_time(normal(key=key(Stream.TIMESTEP, number)), shift=1.0),
                noise_key=key(Stream.NOISE, number),
            )
            for number, clip in enumerate(fixed)
        ]
        yield build_microbatch(pack, samples, sigma_min=1e-5, dtype=dtype, first_stage=True, last_stage=True)


def loss_curve(
    precision: PrecisionConfig,
    *,
    steps: int,
    context: ParallelContext,
    nudge_seed: int | None = None,
    seed: int = SEED,
    anneal: bool = False,
) -> list[float]:
    """Mean loss of each step, on one rank.

    Args:
        precision: of the layers.
        steps: how many.
        context: a world of one rank.
        nudge_seed: draws a change of the first weights by about one rounding of bf16 (2^-9 of each); None changes nothing.
        seed: of clips, first weights, noise and times.
        anneal: the rate falls to 0 in a line over the last half.
    """
    parallel = ParallelConfig()
    chunks, config = build_chunks(MODEL, parallel, precision, context=context)
    initialize_weights(chunks, model=MODEL, context=context, seed=seed)
    if nudge_seed is not None:
        generator = torch.Generator().manual_seed(nudge_seed)
        for parameter in chunks[0].parameters():
            parameter.data.mul_(1 + 2.0**-9 * torch.randn(parameter.shape, generator=generator).to(parameter))
    wrapped = wrap_for_training(chunks, config=config, parallel=parallel, context=context)
    optimizer = build_optimizer(wrapped, optimizer=OPTIMIZER, dtype=config.params_dtype)
    refresh_masters(optimizer)
    ensure_adam_state(optimizer, step=0)
    losses = []
    for step, batch in enumerate(batches(steps, fp8=precision.fp8, dtype=config.params_dtype, device=context.device, seed=seed)):
        for group in optimizer.param_groups if anneal else ():
            group["lr"] = OPTIMIZER.lr * min(1.0, 2 * (1 - step / steps))
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = run_schedule(
            wrapped,
            [batch],
            config=config,
            context=context,
            loss_function=lambda output, micro: velocity_loss(output, micro, context_rank=0),
        )
        optimizer.step()
        losses.append(float(reports[0]) / len(SHAPES))
    return losses

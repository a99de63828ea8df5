"""A micro-batch as tensors: this rank's share of a pack's noised latents, targets and weights.

Everything is drawn by element number from (seed, sample, step), so every rank makes just its slice and all slices agree.
Shape letters: C token channels, N video tokens of a sample, L its text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.diffusion.flow import interpolate, velocity_target
from megasora.diffusion.philox import normal_at
from megasora.models.mmdit.model import ModelInputs
from megasora.models.mmdit.schedule import MicroBatch
from megasora.parallel.pack import Pack
from megasora.parallel.transfer import send


@dataclass(frozen=True, kw_only=True)
class TrainingSample:
    """One sample, whole, as every rank of a replica knows it."""

    tokens: Tensor
    """[N, C] clean latent tokens x_0."""
    text: Tensor
    """[L, text_dim], zeros when its text was dropped."""
    vec: Tensor
    """[vec_dim] pooled text embedding, zeros when dropped."""
    cond: Tensor | None
    """[N, C + patch^2] condition tokens; None when the model takes none."""
    t: float
    """Time in [0, 1], 1 is noise."""
    noise_key: int
    """Key of the sample's noise."""
    weight: float = 1.0
    """1, or 0 for a sample that could not be decoded or only fills a pack."""


def build_microbatch(
    pack: Pack,
    samples: Sequence[TrainingSample],
    *,
    sigma_min: float,
    dtype: torch.dtype,
    first_stage: bool,
    last_stage: bool,
) -> MicroBatch:
    """This rank's slice of a micro-batch.

    Args:
        pack: the samples' layout, same order.
        samples: whole samples.
        sigma_min: noise left at t = 0.
        dtype: activations; noise, interpolation and target are computed in fp32 (fp64 for an fp64 model).
        first_stage, last_stage: whether this rank feeds the model, compares its output.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    channels = samples[0].tokens.shape[1]
    noised = torch.zeros(pack.num_video, channels, dtype=wide, device=pack.device)
    target = torch.zeros_like(noised)
    weight = torch.zeros(pack.num_video, dtype=wide, device=pack.device)
    if first_stage or last_stage:
        for number, sample in enumerate(samples):
            places, tokens = pack.video_part(number)
            x_0 = sample.tokens.to(pack.device)[tokens].to(wide)
            numbers = torch.arange(tokens.start, tokens.stop, tokens.step, device=pack.device)
            elements = numbers[:, None] * channels + torch.arange(channels, device=pack.device)
            x_1 = normal_at(elements, key=sample.noise_key, dtype=wide)
            noised[places] = interpolate(x_0, x_1, sample.t, sigma_min=sigma_min)
            target[places] = velocity_target(x_0, x_1, sigma_min=sigma_min)
            weight[places] = sample.weight / (len(sample.tokens) * channels)
    return MicroBatch(
        pack=pack,
        inputs=_model_inputs(pack, samples, noised, dtype) if first_stage else None,
        target=target if last_stage else None,
        weight=weight if last_stage else None,
        num_counted=sum(sample.weight > 0 for sample in samples),
    )


def _model_inputs(pack: Pack, samples: Sequence[TrainingSample], noised: Tensor, dtype: torch.dtype) -> ModelInputs:
    wide = noised.dtype
    text = torch.zeros(pack.num_text, samples[0].text.shape[1], dtype=dtype, device=pack.device)
    with_cond = samples[0].cond
    cond = None if with_cond is None else torch.zeros(pack.num_video, with_cond.shape[1], dtype=dtype, device=pack.device)
    for number, sample in enumerate(samples):
        places, tokens = pack.text_part(number)
        text[places] = sample.text.to(pack.device)[tokens].to(dtype)
        if cond is not None:
            assert sample.cond is not None, "all samples of a pack have condition tokens or none has"
            places, tokens = pack.video_part(number)
            cond[places] = sample.cond.to(pack.device)[tokens].to(dtype)
    (t,) = send([torch.tensor([sample.t for sample in samples], dtype=wide)], device=pack.device)
    return ModelInputs(
        img=noised.to(dtype),
        txt=text,
        t=t,
        y_vec=torch.stack([sample.vec.to(pack.device, dtype) for sample in samples]),
        cond=cond,
    )


def velocity_loss(output: Tensor, batch: MicroBatch, *, context_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over this rank's tokens of squared error x weight, counted in samples.

    No division by TP, CP or micro-batches: Megatron divides all gradients once by the global number of samples
    (calculate_per_token_loss), which is counted on context rank 0 only.

    Returns:
        (loss sum, int32 samples, detached loss sum).
    """
    assert batch.target is not None and batch.weight is not None, "the last stage compares with a target"
    error = output.to(batch.target.dtype) - batch.target
    loss = (error.square().sum(-1) * batch.weight).sum()
    counted = batch.num_counted if context_rank == 0 else 0
    # filled, not copied: a tensor made from a number would make the host wait
    return loss, torch.full((), counted, dtype=torch.int32, device=output.device), loss.detach()

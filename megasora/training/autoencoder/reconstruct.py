"""Held-out clips through the autoencoder at intervals: PSNR, SSIM, LPIPS where its weights are, and pictures for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.config.autoencoder_run import AutoencoderEvalConfig
from megasora.data.decoding.contract import normalise
from megasora.media.likeness import psnr_of, ssim_of_frames
from megasora.models.autoencoders.losses import Perceptual, perceptual_distance
from megasora.parallel.groups import ParallelContext
from megasora.training.autoencoder.averaged import averaged_weights
from megasora.training.autoencoder.backward import runs_of_frames
from megasora.training.autoencoder.network import TrainedNetwork
from megasora.training.autoencoder.share import ClipShare
from megasora.training.autoencoder.step import AutoencoderTrainee
from megasora.training.metrics import MetricsLog, film_strip
from megasora.training.profiling import Place


class Reconstruct:
    """An event: every replica measures its share of the clips, rank 0 shows its first ones.

    Args:
        clips: (name, pixels uint8 [3, T, H, W]) of all held-out clips.
        settings: when and how many.
        context: this rank's groups.
        log: of the run.
    """

    place: Place = "evaluate"

    def __init__(
        self, clips: Sequence[tuple[str, Tensor]], *, settings: AutoencoderEvalConfig, context: ParallelContext, log: MetricsLog
    ) -> None:
        self.clips, self.settings, self.context, self.log = clips, settings, context, log

    def due(self, step: int, *, last: bool) -> bool:
        """At multiples of the interval, also before the first step, and at the end."""
        return last or step % self.settings.interval_steps == 0

    def happen(self, trainee: AutoencoderTrainee) -> dict[str, Any]:
        """Measure and show; means over clips, PSNR in dB of each clip's mean squared error."""
        average = trainee.ema if self.settings.weights == "ema" else None
        with averaged_weights(trainee.network.module, average) if average is not None else nullcontext():
            return self._measure(trainee)

    @torch.no_grad()
    def _measure(self, trainee: AutoencoderTrainee) -> dict[str, Any]:
        context = self.context
        sums = torch.zeros(3, dtype=torch.float64, device=context.device)
        for number in range(context.at.dp, len(self.clips), context.topology.dp):
            levels = self.clips[number][1].to(context.device)
            share, slab = reconstructed(trainee.network, levels)
            if trainee.lpips is not None:
                sums[2] += _perceptual(trainee.lpips, levels, slab, share)
            made = share.whole(slab)
            if share.rank > 0:
                continue
            sums[:2] += torch.tensor(likeness(self.clips[number][1], levels_of(made)), dtype=torch.float64, device=sums.device)
            if context.rank == 0 and number // context.topology.dp < self.settings.shown_clips:
                strip = torch.cat([film_strip(normalise(levels)), film_strip(made)], dim=2)
                self.log.add_images(f"reconstructions/{number}", strip, step=trainee.step)
        dist.all_reduce(sums)
        psnr, ssim, lpips = (sums / len(self.clips)).tolist()
        measured = {"psnr": psnr, "ssim": ssim, "lpips": lpips if trainee.lpips is not None else None}
        of = " of the average" if self.settings.weights == "ema" else ""
        said = f"step {trainee.step:>6}  held-out{of} PSNR {psnr:.2f} dB, SSIM {ssim:.4f}" + (
            f", LPIPS {lpips:.4f}" if trainee.lpips else ""
        )
        return {
            "event": "reconstruct",
            "step": trainee.step,
            "weights": self.settings.weights,
            **measured,
            "clips": len(self.clips),
            "said": said,
        }


def reconstructed(network: TrainedNetwork, levels: Tensor) -> tuple[ClipShare, Tensor]:
    """(this rank's part of a clip of levels uint8 [3, T, H, W], its reconstruction there, in [-1, 1]); the replica calls it together."""
    _, frames, height, width = levels.shape
    share = network.share(num_frames=frames, height=height, width=width)
    made = network.reconstruct(share.pixels(levels, share.slab), share, key=None).pixels
    return share, made.float().clamp(-1, 1)


def _perceptual(lpips: Perceptual, levels: Tensor, made: Tensor, share: ClipShare) -> float:
    """This rank's part of a clip's LPIPS."""
    real, own = share.pixels(levels, share.frames), share.moved(made, source=share.slab, target=share.frames)
    parts = (perceptual_distance(real[:, run], own[:, run], lpips=lpips, frames=share.num_frames) for run in runs_of_frames(own))
    return sum(map(float, parts), 0.0)


def levels_of(video: Tensor) -> Tensor:
    """Levels uint8 of a clip in [-1, 1], on the CPU."""
    return video.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def likeness(a: Tensor, b: Tensor) -> tuple[float, float]:
    """(PSNR in dB, SSIM) of two clips of levels uint8 [3, T, H, W]."""
    squared = float((a.int() - b.int()).pow(2).double().mean())
    with ThreadPoolExecutor() as pool:
        ssim = ssim_of_frames(a.transpose(0, 1), b.transpose(0, 1), pool=pool) / a.shape[1]
    return min(psnr_of(squared), 100.0), ssim  # a clip that comes back exactly would make the mean infinite

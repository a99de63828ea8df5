"""Whether a diffusion transformer learns distilled latents faster: autoencoders with and without a teacher, then a transformer on each.

    OMP_NUM_THREADS=1 python benchmarks/distillation.py [--seeds 0 1 2] [--scale 1.0] [--output FOLDER]

One autoencoder per seed (tiny_ae's sizes) learns L1 on made clips of moving shapes; every arm goes on from it for the same steps on the
same clips: without a teacher, or aligned (weight 0.5, adaptive, no margins) with a random DINOv2, or with an oracle. The oracle's features
of a place are the shares of it that each kind of shape and the background cover: what it shows, and not how it looks. Then an MMDiT of
the same start learns each arm's latents, brought to mean 0 and deviation 1 by channel, for the same steps, noise and times. A DINOv2 of
published weights is not to be had here: the oracle stands in for one that knows everything about these clips.

Held-out numbers: flow-matching loss (mean square of the velocity's error, latents of unit deviation); PSNR of the autoencoder; PSNR of the
decoded estimate of the clean latent, which is in pixels and so means the same in each latent space; the share of the latent's channels that
its covariance fills (participation ratio), because a latent whose channels repeat each other is easier to predict without being better.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

warnings.filterwarnings("ignore")

from moving_shapes import CLASSES, Clips, make_clips  # noqa: E402

from megasora import recipes  # noqa: E402
from megasora.config.distillation import DistillationConfig  # noqa: E402
from megasora.config.files import json_lines  # noqa: E402
from megasora.config.schema import ModelConfig, ParallelConfig, PrecisionConfig  # noqa: E402
from megasora.diffusion.flow import interpolate, training_time, velocity_target  # noqa: E402
from megasora.models.autoencoders.alignment import Projector  # noqa: E402
from megasora.models.autoencoders.teacher import make_tiny_teacher  # noqa: E402
from megasora.models.mmdit.build import build_chunks  # noqa: E402
from megasora.models.mmdit.initialization import initialize_weights  # noqa: E402
from megasora.models.mmdit.model import ModelInputs  # noqa: E402
from megasora.parallel import groups  # noqa: E402
from megasora.parallel.groups import ParallelContext  # noqa: E402
from megasora.parallel.pack import Pack, PackSplit, SampleShape  # noqa: E402
from megasora.training.autoencoder.backward import MEASURED, ClipDraws, Losses, backward_clip  # noqa: E402
from megasora.training.autoencoder.distillation import Distillation  # noqa: E402
from megasora.training.autoencoder.network import TrainedNetwork, new_network  # noqa: E402
from megasora.training.autoencoder.teaching import build_distillation  # noqa: E402

CPU = torch.device("cpu")
ARMS: dict[str, tuple[str, str] | None] = {
    "no teacher": None,
    "random DINOv2, latent": ("random", "latent"),
    "oracle, stages.1": ("oracle", "stages.1"),
    "oracle, latent": ("oracle", "latent"),
}
"""(teacher, layer)"""
SIDE, FRAMES, PLACE = 16, 8, 4
"""Pixels, frames, and how many of either a place of the latent and of stages.1 covers."""
TRAIN_CLIPS, HELD_OUT = 512, 48
BASE_STEPS, ARM_STEPS, AE_BATCH, AE_LR, ARM_LR = 300, 300, 2, 4e-3, 2e-3
"""Rates of tiny_ae."""
DIT_STEPS, DIT_BATCH, DIT_LR = 500, 8, 1e-3
MODEL = ModelConfig(
    hidden_size=64,
    num_attention_heads=4,
    num_double_blocks=1,
    num_single_blocks=2,
    ffn_hidden_size=256,
    in_channels=32,
    patch_size=1,
    text_dim=8,
    vec_dim=8,
    time_dim=32,
    cond_embed=False,
    axes_dim=(4, 6, 6),
)
TEXT_TOKENS = 1
SIGMA_MIN = 1e-5
ESTIMATE_T = 0.5
"""Time at which the clean latent is estimated and decoded."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Steps of each part."""

    scale: float

    def of(self, steps: int) -> int:
        """Scaled, for a quick try."""
        return max(2, round(steps * self.scale))


def order_of(steps: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Clips of each step, the same for every arm."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(TRAIN_CLIPS, (batch,), generator=generator).tolist()


def train_autoencoder(
    network: TrainedNetwork, distillation: Distillation | None, clips: Clips, *, steps: int, lr: float, seed: int
) -> dict[str, float]:
    """Adam on L1 and the teacher's term; means of the last tenth of the steps."""
    parameters = [*network.module.parameters(), *(distillation.projector.parameters() if distillation is not None else ())]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.98))
    config = recipes.get_autoencoder("tiny_ae")
    losses_of = Losses(settings=config.loss, lpips=None, adversary=config.discriminator, discriminator=None, distillation=distillation)
    draws = ClipDraws(posterior=0, patches=0)
    said = []
    for chosen in order_of(steps, AE_BATCH, seed):
        optimizer.zero_grad()
        sums = torch.zeros(len(MEASURED), dtype=torch.float64)
        for number in chosen:
            features = clips.shares[number] if distillation is not None and distillation.teacher is None else None
            sums += backward_clip(network, clips.levels[number], losses_of=losses_of, draws=draws, share=1 / AE_BATCH, features=features)
        nn.utils.clip_grad_norm_(network.module.parameters(), 1.0)
        optimizer.step()
        said.append(sums / AE_BATCH)
    last = torch.stack(said[-max(1, steps // 10) :]).mean(dim=0)
    return dict(zip(MEASURED, last.tolist(), strict=True))


@torch.no_grad()
def latents_of(network: TrainedNetwork, videos: Tensor) -> Tensor:
    """[n, C, t, h, w]."""
    return torch.cat([network.network.moments(video[None]) for video in videos])


def psnr(video: Tensor, made: Tensor) -> float:
    """dB of levels in [0, 1]."""
    return -10 * math.log10(float(((video - made.clamp(-1, 1)) / 2).square().mean()))


def filled_channels(latents: Tensor) -> float:
    """Participation ratio of the channels' covariance over places and clips, as a share of the channels."""
    places = latents.transpose(0, 1).flatten(1).double()
    values = torch.linalg.eigvalsh(torch.cov(places))
    return float(values.sum() ** 2 / values.square().sum() / len(values))


class Denoiser:
    """An MMDiT of random weights that depend on the seed, on latents as tokens; it is told no text."""

    def __init__(self, grid: tuple[int, int, int], *, context: ParallelContext, seed: int) -> None:
        chunks, _ = build_chunks(MODEL, ParallelConfig(), PrecisionConfig(dtype="fp32"), context=context)
        initialize_weights(chunks, model=MODEL, context=context, seed=seed)
        self.module, self.grid = chunks[0], grid

    def velocity(self, latents: Tensor, t: Tensor) -> Tensor:
        """Of noised latents [n, C, t, h, w] at times [n]."""
        number = len(latents)
        pack = Pack([SampleShape(text_tokens=TEXT_TOKENS, grid=self.grid)] * number, split=PackSplit())
        tokens = latents.flatten(2).transpose(1, 2).flatten(0, 1)
        text, vec = torch.zeros(number * TEXT_TOKENS, MODEL.text_dim), torch.zeros(number, MODEL.vec_dim)
        made: Tensor = self.module(ModelInputs(img=tokens, txt=text, t=t, y_vec=vec, cond=None), pack)
        return made.unflatten(0, (number, -1)).transpose(1, 2).reshape(latents.shape)


def noised(latents: Tensor, generator: torch.Generator, t: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(noised latents, times, velocity) with drawn noise, and times where none are given."""
    noise = torch.randn(latents.shape, generator=generator)
    if t is None:
        t = torch.tensor([training_time(float(x), shift=1.0) for x in torch.randn(len(latents), generator=generator)])
    wide = t[:, None, None, None, None]
    return interpolate(latents, noise, wide, sigma_min=SIGMA_MIN), t, velocity_target(latents, noise, sigma_min=SIGMA_MIN)


def train_denoiser(latents: Tensor, *, context: ParallelContext, steps: int, seed: int) -> Denoiser:
    """On training latents of unit deviation."""
    denoiser = Denoiser(tuple(latents.shape[-3:]), context=context, seed=seed)
    optimizer = torch.optim.Adam(denoiser.module.parameters(), lr=DIT_LR)
    generator = torch.Generator().manual_seed(seed)
    for chosen in order_of(steps, DIT_BATCH, seed + 1):
        given, t, velocity = noised(latents[chosen], generator)
        loss = (denoiser.velocity(given, t) - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.module.parameters(), 1.0)
        optimizer.step()
    return denoiser


@torch.no_grad()
def held_out_loss(denoiser: Denoiser, latents: Tensor, *, draws: int = 4) -> float:
    """Flow-matching loss of held-out latents, with the same noise and times for every arm."""
    generator, sums = torch.Generator().manual_seed(99), 0.0
    for _ in range(draws):
        given, t, velocity = noised(latents, generator)
        sums += float((denoiser.velocity(given, t) - velocity).square().mean())
    return sums / draws


def measure_arm(network: TrainedNetwork, clips: Clips, *, context: ParallelContext, steps: int, seed: int) -> dict[str, float]:
    """Train a denoiser on an autoencoder's latents; the held-out numbers."""
    network.module.eval()
    latents = latents_of(network, clips.videos)
    own, other = latents[:TRAIN_CLIPS], latents[TRAIN_CLIPS:]
    mean, std = (of(own, dim=(0, 2, 3, 4), keepdim=True) for of in (torch.mean, torch.std))
    denoiser = train_denoiser((own - mean) / std, context=context, steps=steps, seed=seed)
    unit, videos = (other - mean) / std, clips.videos[TRAIN_CLIPS:]
    with torch.no_grad():
        t = torch.full((len(unit),), ESTIMATE_T)
        given, _, _ = noised(unit, torch.Generator().manual_seed(98), t)
        estimate = (given - ESTIMATE_T * denoiser.velocity(given, t)) * std + mean
        made, again = (torch.cat([network.network.pixels(z[None]) for z in latent]) for latent in (estimate, other))
    return {
        "flow_loss": held_out_loss(denoiser, unit),
        "psnr": psnr(videos, again),
        "estimate_psnr": psnr(videos, made),
        "filled": filled_channels((own - mean) / std),
    }


def teacher_of(arm: str, network: TrainedNetwork, folder: Path) -> Distillation | None:
    """An arm's, with a new projector."""
    chosen = ARMS[arm]
    if chosen is None:
        return None
    teacher, layer = chosen
    settings = DistillationConfig(weight=0.5, teacher=str(folder), layer=layer, cosine_margin=0.0, gram_margin=0.0)
    config = replace(recipes.get_autoencoder("tiny_ae"), distillation=settings)
    found = build_distillation(config, network, device=CPU, dtype=torch.float32)
    if teacher == "random":
        return found
    projector = Projector(32, CLASSES + 1, width=None)  # both layers have 32 channels
    projector.initialize(seed=0)
    return replace(found, teacher=None, projector=projector)


def run_arm(
    arm: str, base: TrainedNetwork, clips: Clips, folder: Path, *, lengths: Lengths, seed: int, context: ParallelContext
) -> dict[str, float]:
    """One arm of one seed."""
    network = new_network(recipes.get_autoencoder("tiny_ae").autoencoder, weights=None, load=True, seed=seed)
    network.module.load_state_dict(base.module.state_dict())
    distillation = teacher_of(arm, network, folder)
    said = train_autoencoder(network, distillation, clips, steps=lengths.of(ARM_STEPS), lr=ARM_LR, seed=seed + 500)
    found = measure_arm(network, clips, context=context, steps=lengths.of(DIT_STEPS), seed=seed)
    return {**found, "cosine": said["cosine"], "gram": said["gram"]}


def main() -> None:
    """Run all arms of all seeds; prints a table and writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of steps")
    parser.add_argument("--output", type=Path, default=Path("distillation"))
    args = parser.parse_args()
    started, lengths = time.time(), Lengths(scale=args.scale)
    groups.start_world(CPU, timeout_minutes=1)
    context = groups.initialize(ParallelConfig(), device=CPU, num_attention_heads=MODEL.num_attention_heads, seed=0)
    clips = make_clips(TRAIN_CLIPS + HELD_OUT, side=SIDE, frames=FRAMES, place=PLACE, seed=0)
    args.output.mkdir(parents=True, exist_ok=True)
    folder = make_tiny_teacher(args.output / "random_dinov2")
    with (args.output / "results.jsonl").open("a") as file:
        for seed in args.seeds:
            base = new_network(recipes.get_autoencoder("tiny_ae").autoencoder, weights=None, load=True, seed=1024 + seed)
            train_autoencoder(base, None, clips, steps=lengths.of(BASE_STEPS), lr=AE_LR, seed=seed)
            for arm in ARMS:
                found = run_arm(arm, base, clips, folder, lengths=lengths, seed=1024 + seed, context=context)
                file.write(json.dumps({"seed": seed, "arm": arm, **found}) + "\n")
                file.flush()
                print(f"seed {seed}, {arm}: flow loss {found['flow_loss']:.4f} after {time.time() - started:.0f} s", flush=True)
    print(table(list(json_lines(args.output / "results.jsonl"))))


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, with standard deviations; the loss's difference from the arm without a teacher is paired by seed."""
    lines = ["| arm | flow loss | less than without | PSNR, dB | estimate's PSNR, dB | channels filled |", "|---|---|---|---|---|---|"]
    without = {row["seed"]: row["flow_loss"] for row in rows if row["arm"] == "no teacher"}
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        cells = [_spread([row["flow_loss"] for row in own], 4), _spread([without[row["seed"]] - row["flow_loss"] for row in own], 4)]
        cells += [_spread([row[name] for row in own], digits) for name, digits in (("psnr", 2), ("estimate_psnr", 2), ("filled", 3))]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()

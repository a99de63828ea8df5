"""From clips to a table: means with their uncertainty, distances of features, costs, and latents, for each autoencoder and shape."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megasora import __version__
from megasora.config.errors import UserError
from megasora.config.latent_statistics import LatentStatistics
from megasora.evaluation.autoencoders.cells import Cell
from megasora.evaluation.autoencoders.frechet import frechet_distance
from megasora.evaluation.autoencoders.latents import LatentMoments, merged
from megasora.evaluation.autoencoders.published import Published, published_for
from megasora.evaluation.autoencoders.run import Evaluation, Group
from megasora.evaluation.autoencoders.settings import Shape
from megasora.evaluation.autoencoders.subjects import Subject
from megasora.evaluation.intervals import Summary, summarise
from megasora.models.autoencoders.cost import AutoencoderCost
from megasora.models.autoencoders.memory import AutoencoderMemory

RESAMPLES = 1_000
"""Of the intervals in results.json; the table says standard errors."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of the clips that went through warm, or of all where only one went through."""

    count: int
    median: float
    least: float
    most: float


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A Frechet distance of features."""

    value: float
    samples: int
    """Frames or clips."""
    dims: int
    """Features of each. With no more samples than these the covariances are not whole: compare equal numbers of samples only."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One way through the autoencoder."""

    seconds: Seconds
    measured_bytes: int | None
    """Most over clips, beside the weights; None on a CPU."""
    counted_bytes: int
    """The same counted on tensors without data, work space of convolutions left out."""
    flops: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One autoencoder at one shape."""

    subject: str
    shape: Shape
    clips: int
    skipped: int
    psnr: Summary | None
    """Over clips that differ; None where none does."""
    equal_clips: int
    """Clips equal in every frame: their PSNR is infinite, so they are left out of its mean."""
    equal_frames: int
    """Frames that are equal, in all clips."""
    ssim: Summary
    lpips: Summary | None
    fid: Distance | None
    fvd: Distance | None
    encode: Cost
    decode: Cost
    latent_std: float


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Of one autoencoder, over all shapes together."""

    moments: LatentMoments
    statistics: LatentStatistics


@dataclass(frozen=True, kw_only=True)
class About:
    """One autoencoder."""

    subject: Subject
    parameters: int
    values_per_latent: float
    """Numbers of a clip per number of its latent (D_info of arXiv 2503.09642)."""
    published: Published | None
    latents: Latents | None
    """None where no clip went through."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """The whole comparison."""

    evaluation: Evaluation
    rows: tuple[Row, ...]
    about: tuple[About, ...]

    @cached_property
    def skipped(self) -> tuple[str, ...]:
        """A line for everything that was not measured."""
        lines = [
            f"{group.subject.name}, {group.shape.words}, {clip.name}: {reason}"
            for group in self.evaluation.groups
            for clip, reason in group.skipped
        ]
        return (*self.evaluation.skipped, *lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity."""
        settings = self.evaluation.settings
        return {
            "out": str(settings.out),
            "device": self.evaluation.device,
            "dtype": settings.dtype,
            "tiling": str(settings.cutting),
            "lpips_backbone": self.evaluation.lpips,
            "autoencoders": [_about_dict(about) for about in self.about],
            "rows": [{**asdict(row), "shape": str(row.shape)} for row in self.rows],
            "clips": [line for group in self.evaluation.groups for line in _clip_dicts(group)],
            "left_out": list(self.evaluation.left_out),
            "skipped": list(self.skipped),
        }


def _about_dict(about: About) -> dict[str, Any]:
    facts = about.subject.facts
    kept = None if about.latents is None else about.latents.statistics
    return {
        "name": about.subject.name,
        "path": str(about.subject.path),
        "class": facts.name,
        "compression": [facts.temporal_compression, facts.spatial_compression],
        "channels": facts.latent_channels,
        "causal": facts.causal,
        "parameters": about.parameters,
        "values_per_latent": about.values_per_latent,
        "weights_sha256": about.subject.sha256,
        "scaling_factor_in_config": facts.scaling_factor,
        "scaling_factor_measured": kept.scaling_factor if kept is not None and kept.std > 0 else None,
        "latents": None if kept is None else asdict(kept),
        "published": None if about.published is None else asdict(about.published),
    }


def _clip_dicts(group: Group) -> Iterable[dict[str, Any]]:
    for clip, cell in group.cells:
        measures = cell.measures
        facts = {"autoencoder": group.subject.name, "shape": str(group.shape), "clip": clip.name}
        psnr = None if math.isinf(measures.psnr) else measures.psnr
        yield {**facts, "psnr": psnr, "equal_frames": measures.equal_frames, **asdict(measures), "cell": cell.folder.name}


def summarise_evaluation(evaluation: Evaluation) -> Results:
    """The table of an evaluation."""
    rows = tuple(_row(group) for group in evaluation.groups if group.cells)
    subjects = {group.subject.name: group.subject for group in evaluation.groups}
    about = tuple(_about(subject, evaluation) for subject in subjects.values())
    return Results(evaluation=evaluation, rows=rows, about=about)


def _row(group: Group) -> Row:
    cells = [cell for _, cell in group.cells]
    measures = [cell.measures for cell in cells]
    moments = merged(cell.moments for cell in cells)
    assert moments is not None
    finite = [one.psnr for one in measures if math.isfinite(one.psnr)]
    distances = [one.lpips for one in measures if one.lpips is not None]
    encode, decode = _costs(group, cells)
    return Row(
        subject=group.subject.name,
        shape=group.shape,
        clips=len(cells),
        skipped=len(group.skipped),
        psnr=summarise(finite, resamples=RESAMPLES) if finite else None,
        equal_clips=len(cells) - len(finite),
        equal_frames=sum(one.equal_frames for one in measures),
        ssim=summarise([one.ssim for one in measures], resamples=RESAMPLES),
        lpips=summarise(distances, resamples=RESAMPLES) if distances else None,
        fid=_distance(cells, "fid"),
        fvd=_distance(cells, "fvd"),
        encode=encode,
        decode=decode,
        latent_std=moments.over_channels[1],
    )


def _costs(group: Group, cells: Sequence[Cell]) -> tuple[Cost, Cost]:
    """(encode, decode)."""
    shape = {"num_frames": group.shape.num_frames, "height": group.shape.height, "width": group.shape.width}
    memory, flops = AutoencoderMemory(group.subject.blank), AutoencoderCost(group.subject.blank)
    warm = [cell.measures for cell in cells if cell.measures.warm] or [cell.measures for cell in cells]
    ways: list[tuple[str, Callable[..., int], Callable[..., int]]] = [
        ("encode", memory.encode, flops.encode),
        ("decode", memory.decode, flops.decode),
    ]
    found = []
    for way, counted, counted_flops in ways:
        seconds = [getattr(one, f"{way}_s") for one in warm]
        taken = [size for cell in cells if (size := getattr(cell.measures, f"{way}_bytes")) is not None]
        found.append(
            Cost(
                seconds=Seconds(count=len(seconds), median=statistics.median(seconds), least=min(seconds), most=max(seconds)),
                measured_bytes=max(taken, default=None),
                counted_bytes=counted(**shape),
                flops=counted_flops(**shape),
            )
        )
    return found[0], found[1]


def _distance(cells: Sequence[Cell], name: str) -> Distance | None:
    """None where nothing was asked for, or one sample is all there is."""
    pairs = [cell.features[name] for cell in cells if name in cell.features]
    if not pairs:
        return None
    one, other = (np.concatenate([pair[side] for pair in pairs]).astype(np.float64) for side in (0, 1))
    return Distance(value=frechet_distance(one, other), samples=len(one), dims=one.shape[1]) if len(one) > 1 else None


def _about(subject: Subject, evaluation: Evaluation) -> About:
    facts = subject.facts
    parameters = sum(parameter.numel() for parameter in subject.blank.parameters())
    pixels = 3 * facts.temporal_compression * facts.spatial_compression**2
    return About(
        subject=subject,
        parameters=parameters,
        values_per_latent=pixels / facts.latent_channels,
        published=published_for(facts, parameters=parameters),
        latents=_latents(subject, [group for group in evaluation.groups if group.subject is subject and group.cells], evaluation),
    )


def _latents(subject: Subject, groups: Sequence[Group], evaluation: Evaluation) -> Latents | None:
    moments = merged(cell.moments for group in groups for _, cell in group.cells)
    if moments is None:
        return None
    mean, std = moments.over_channels
    kept = LatentStatistics(
        latents_mean=tuple(moments.mean.tolist()),
        latents_std=tuple(moments.std.tolist()),
        mean=mean,
        std=std,
        values=moments.count,
        clips=len({clip.name for group in groups for clip, _ in group.cells}),
        shapes=tuple(str(group.shape) for group in groups),
        weights_sha256=subject.sha256,
        dtype=evaluation.settings.dtype,
        tiling=str(evaluation.settings.cutting),
        megasora=__version__,
    )
    return Latents(moments=moments, statistics=kept)


def statistics_to_keep(about: About) -> LatentStatistics:
    """What goes into the folder's config.json.

    Raises:
        UserError: no clip went through it.
    """
    if about.latents is None:
        raise UserError(f"{about.subject.name}: no clip went through, there is nothing to write into its config.json")
    return about.latents.statistics

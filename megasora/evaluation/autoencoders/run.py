"""Every clip through every autoencoder at every shape; what is finished is left alone. Ranks under torchrun share out the clips."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from megasora.config.errors import UserError
from megasora.data.decoding.contract import DecodeError, DecodeRequest
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.loader import decoded_ahead
from megasora.evaluation.autoencoders.cells import Cell, Cells, key_of
from megasora.evaluation.autoencoders.clips import SourceClip, find_clips
from megasora.evaluation.autoencoders.frechet import FeatureNetwork
from megasora.evaluation.autoencoders.measure import NotFiniteError, Tools, measure_clip
from megasora.evaluation.autoencoders.settings import EvaluationSettings, Shape
from megasora.evaluation.autoencoders.subjects import Subject, open_subjects, shapes_for
from megasora.media.likeness import SSIM_WINDOW
from megasora.models.autoencoders.autoencoder import Autoencoder
from megasora.models.encoders.bundle import be_quiet
from megasora.models.lpips import SMALLEST_SIDE, Lpips, load_lpips
from megasora.parallel import groups

FORMAT = "megasora-evaluate-ae-1"
"""Of a cell: a change of what is measured is a new one."""
WAIT_MINUTES = 7 * 24 * 60.0
"""Longest that a rank waits for the others at the end."""
OnClip = Callable[[int, int, int], None]
"""Told (clips done, all, failed) of this rank."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One clip at one shape through one autoencoder."""

    subject: Subject
    shape: Shape
    clip: SourceClip
    request: DecodeRequest | None
    """None where the clip cannot give that shape."""
    made_of: dict[str, Any]
    """What the numbers depend on; why there are none where there is no request."""

    @cached_property
    def key(self) -> str:
        """Of its cell."""
        return key_of(self.made_of)


@dataclass(frozen=True, kw_only=True)
class Group:
    """All clips of one autoencoder at one shape."""

    subject: Subject
    shape: Shape
    cells: tuple[tuple[SourceClip, Cell], ...]
    skipped: tuple[tuple[SourceClip, str], ...]
    """What could not be measured, and why."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that was measured, in the order asked for."""

    settings: EvaluationSettings
    groups: tuple[Group, ...]
    skipped: tuple[str, ...]
    """Rows of the manifest that are no clips."""
    left_out: tuple[str, ...]
    """Shapes that one autoencoder does not take and another does."""
    lpips: str | None
    """Backbone."""
    device: str
    decoder: str
    ranks: int


def evaluate_autoencoders(settings: EvaluationSettings, *, on_clip: OnClip | None = None) -> Evaluation | None:
    """Measure what is not finished; all of it on the first rank, None on the others.

    Raises:
        UserError: weights, clips or settings do not allow it, or no clip could be measured.
    """
    be_quiet()
    device, ranks = groups.choose_device(settings.device), groups.launched_ranks(os.environ)
    subjects = open_subjects(settings.weights, select=settings.select, dtype=settings.dtype, cutting=settings.cutting)
    taken = shapes_for(subjects, settings.shapes)
    clips, skipped = find_clips(settings.clips, limit=settings.limit)
    if ranks > 1:
        groups.start_world(device, timeout_minutes=WAIT_MINUTES)
    with ThreadPoolExecutor() as pool:
        tools = _tools(settings, device=device, pool=pool)
        decoder = PyAVDecoder()
        about = _common_facts(settings, tools, device=device, decoder=decoder.identity)
        tasks = [
            _task(subject, shape, clip, fps=settings.fps, about=about)
            for subject in subjects
            for shape in taken[subject.name]
            for clip in clips
        ]
        rank = dist.get_rank() if ranks > 1 else 0
        own = [task for number, task in enumerate(tasks) if number % len(clips) % ranks == rank]
        cells = Cells(settings.out)
        _work(own, cells, device=device, tools=tools, decoder=decoder, on_clip=on_clip)
    if ranks > 1:
        dist.barrier()
    if rank:
        return None
    left_out = [
        f"{subject.name}: {shape.words}, it takes other numbers of frames or sizes"
        for subject in subjects
        for shape in settings.shapes
        if shape not in taken[subject.name]
    ]
    found = Evaluation(
        settings=settings,
        groups=tuple(_collected(tasks, cells)),
        skipped=skipped,
        left_out=tuple(left_out),
        lpips=None if tools.lpips is None else tools.lpips.backbone,
        device=about["device"],
        decoder=decoder.identity,
        ranks=ranks,
    )
    if not any(group.cells for group in found.groups):
        raise UserError(f"no clip could be measured; the first: {found.groups[0].skipped[0][1]}")
    return found


def _tools(settings: EvaluationSettings, *, device: torch.device, pool: ThreadPoolExecutor) -> Tools:
    """What measures, from the files that are given.

    Raises:
        UserError: a file holds something else, or a size is too small for a measure.
    """
    lpips = None if settings.lpips is None else load_lpips(settings.lpips).to(device)
    smallest = max(SSIM_WINDOW, SMALLEST_SIDE[lpips.backbone] if lpips is not None else 1)
    for shape in settings.shapes:
        if min(shape.height, shape.width) < smallest:
            raise UserError(f"--sizes {shape.height}x{shape.width} is too small: the measures need {smallest} pixels a side")
    fid, fvd = (
        None if path is None else FeatureNetwork(path, flag=flag, device=device)
        for path, flag in ((settings.fid, "--fid"), (settings.fvd, "--fvd"))
    )
    return Tools(lpips=lpips, fid=fid, fvd=fvd, pool=pool)


def _common_facts(settings: EvaluationSettings, tools: Tools, *, device: torch.device, decoder: str) -> dict[str, Any]:
    """What all numbers of this command depend on."""
    return {
        "format": FORMAT,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "decoder": decoder,
        "dtype": settings.dtype,
        "tiling": str(settings.cutting),
        "lpips": None if tools.lpips is None else _sha256(tools.lpips),
        "fid": None if tools.fid is None else tools.fid.sha256,
        "fvd": None if tools.fvd is None else tools.fvd.sha256,
    }


def _sha256(lpips: Lpips) -> str:
    hashed = hashlib.sha256()
    for name, tensor in sorted(lpips.named_buffers()):
        hashed.update(name.encode())
        hashed.update(tensor.cpu().numpy().tobytes())
    return hashed.hexdigest()


def _task(subject: Subject, shape: Shape, clip: SourceClip, *, fps: float | None, about: dict[str, Any]) -> Task:
    made_of: dict[str, Any] = {**about, "weights": subject.sha256, "sizes": subject.sizes, "shape": str(shape), "clip": clip.name}
    try:
        request = clip.request(shape, fps=fps)
        status = clip.path.stat()
    except (ValueError, OSError) as error:
        what = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        return Task(subject=subject, shape=shape, clip=clip, request=None, made_of={**made_of, "refused": f"{clip.path}: {what}"})
    made_of["file"] = {"path": str(clip.path.resolve()), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    made_of["frames"] = {"start": request.start, "stride": request.stride, "crop": request.crop}
    return Task(subject=subject, shape=shape, clip=clip, request=request, made_of=made_of)


def _work(tasks: Sequence[Task], cells: Cells, *, device: torch.device, tools: Tools, decoder: PyAVDecoder, on_clip: OnClip | None) -> None:
    """Measure this rank's tasks that are not finished; an autoencoder is loaded when its first one comes."""
    todo = [task for task in tasks if task.request is not None and not cells.has(task.key)]
    done, failed = len(tasks) - len(todo), sum(task.request is None for task in tasks)
    loaded: tuple[Subject, Autoencoder] | None = None
    warm: set[tuple[str, Shape]] = set()
    requests = (task.request for task in todo if task.request is not None)
    for task, levels in zip(todo, decoded_ahead(requests, decoder=decoder, workers=1, ahead=2), strict=True):
        if on_clip is not None:
            on_clip(done, len(tasks), failed)
        if loaded is None or loaded[0] is not task.subject:
            loaded = None  # its memory goes before the next one's comes
            loaded = task.subject, task.subject.load(device)
        try:
            if isinstance(levels, DecodeError):
                raise levels
            kind = task.subject.name, task.shape
            measured = measure_clip(loaded[1], levels, tools=tools, warm=kind in warm)
            warm.add(kind)
            cells.save(task.key, task.made_of, levels=levels, measured=measured)
        except (DecodeError, NotFiniteError) as error:
            cells.fail(task.key, " ".join(str(error).split()))
            failed += 1
        done += 1
    if on_clip is not None:
        on_clip(len(tasks), len(tasks), failed)


def _collected(tasks: Sequence[Task], cells: Cells) -> Iterator[Group]:
    """Finished cells, by autoencoder and shape."""
    grouped: dict[tuple[str, Shape], list[Task]] = {}
    for task in tasks:
        grouped.setdefault((task.subject.name, task.shape), []).append(task)
    for members in grouped.values():
        there = [task for task in members if task.request is not None and cells.has(task.key)]
        yield Group(
            subject=members[0].subject,
            shape=members[0].shape,
            cells=tuple((task.clip, cells.load(task.key)) for task in there),
            skipped=tuple((task.clip, _reason(task, cells)) for task in members if task not in there),
        )


def _reason(task: Task, cells: Cells) -> str:
    return str(task.made_of.get("refused") or cells.failure(task.key) or "not measured; run the same command again")

"""How close clips are to others of the same names: PSNR, SSIM and LPIPS of each clip, then over all."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from megasora.config.errors import UserError
from megasora.config.files import written_whole
from megasora.data.decoding.contract import DecodeError, normalise
from megasora.evaluation.files import ClipFacts, clip_facts, clips_in, runs_of_frames
from megasora.evaluation.intervals import Summary, summarise
from megasora.media.likeness import SSIM_WINDOW, psnr_of, ssim_of_frames
from megasora.models.lpips import SMALLEST_SIDE, Lpips

SHOWN = 40
"""Clips that the table on the screen lists."""
FRAMES_AT_ONCE = 8
"""Frames that are worked on together."""
Measure = Literal["psnr", "ssim", "lpips"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
OnClip = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two clips of one name and size."""

    name: str
    a: Path
    b: Path
    facts: ClipFacts


@dataclass(frozen=True, kw_only=True)
class ClipFidelity:
    """Measures of one pair."""

    name: str
    num_frames: int
    height: int
    width: int
    psnr: float | None
    """dB, of the mean squared error of all frames and channels; infinite for equal clips. None: not asked for, as the next two."""
    ssim: float | None
    """Mean over frames and channels."""
    lpips: float | None
    """Mean over frames."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Measures of two folders."""

    clips: tuple[ClipFidelity, ...]
    skipped: tuple[str, ...]
    """One line each: what was not compared, and why."""

    @property
    def equal(self) -> int:
        """Clips equal in every pixel: their PSNR is infinite, so they are left out of PSNR's mean."""
        return sum(clip.psnr == math.inf for clip in self.clips)

    def summaries(self, *, seed: int = 0) -> dict[str, Summary]:
        """Each measure over the clips that have it."""
        values = {name: [value for clip in self.clips if (value := getattr(clip, name)) is not None] for name in MEASURES}
        finite = {name: [value for value in given if math.isfinite(value)] for name, given in values.items()}
        return {name: summarise(given, seed=seed) for name, given in finite.items() if given}

    def as_dict(self, *, seed: int = 0) -> dict[str, Any]:
        """For JSON, which knows no infinity: PSNR of equal clips is null."""
        clips = [{**asdict(clip), "psnr": None if clip.psnr == math.inf else clip.psnr} for clip in self.clips]
        summary = {name: asdict(value) for name, value in self.summaries(seed=seed).items()}
        return {"clips": clips, "summary": summary, "equal": self.equal, "skipped": list(self.skipped)}


def pair_up(a: Path, b: Path, *, smallest: int = SSIM_WINDOW) -> tuple[list[Pair], list[str]]:
    """Pairs of two folders, and a line about every clip that has no partner of its size or cannot be read.

    Args:
        a, b: folders.
        smallest: pixels a side that the measures need.

    Raises:
        UserError: a folder holds no clips, or the two share no name.
    """
    of_a, of_b = clips_in(a), clips_in(b)
    shared = [name for name in of_a if name in of_b]
    if not shared:
        raise UserError(f"{a} and {b} share no clip of one name, for example {next(iter(of_a))} and {next(iter(of_b))}")
    skipped = [f"{name}: only in {a}" for name in of_a if name not in of_b] + [f"{name}: only in {b}" for name in of_b if name not in of_a]
    pairs = []
    for name in shared:
        try:
            one, other = clip_facts(of_a[name]), clip_facts(of_b[name])
        except DecodeError as error:
            skipped.append(f"{name}: {error}")
            continue
        if (one.height, one.width) != (other.height, other.width):
            skipped.append(f"{name}: sizes differ, {one.height}x{one.width} and {other.height}x{other.width}")
        elif one.num_frames != other.num_frames:
            skipped.append(f"{name}: frame counts differ, {one.num_frames} and {other.num_frames}")
        elif min(one.height, one.width) < smallest:
            skipped.append(f"{name}: {one.height}x{one.width} is too small, the measures need {smallest} pixels a side")
        else:
            pairs.append(Pair(name=name, a=of_a[name], b=of_b[name], facts=one))
    return pairs, skipped


def smallest_side(measures: Sequence[Measure], lpips: Lpips | None) -> int:
    """Pixels a side that the measures need."""
    return max(SSIM_WINDOW if "ssim" in measures else 1, SMALLEST_SIDE[lpips.backbone] if lpips is not None else 1)


def compare_pairs(
    pairs: Sequence[Pair],
    skipped: Sequence[str],
    *,
    measures: Sequence[Measure],
    lpips: Lpips | None = None,
    device: str = "cpu",
    on_clip: OnClip | None = None,
) -> Fidelity:
    """Measure every pair.

    Args:
        pairs, skipped: of `pair_up`.
        measures: which; none compares nothing and only says what is paired.
        lpips: with weights, where it is among them.
        device: where LPIPS is computed.
        on_clip: told (clips done, all) after each.

    Raises:
        UserError: LPIPS was asked for without weights, or nothing could be compared.
    """
    if "lpips" in measures and lpips is None:
        raise UserError("LPIPS needs its weights: --lpips DIR with torchvision's AlexNet or VGG16 and the lin layers of lpips/weights/v0.1")
    clips, left_out = [], list(skipped)
    for done, pair in enumerate(pairs):
        try:
            clips.append(measure(pair, measures, lpips=lpips, device=device))
        except DecodeError as error:
            left_out.append(f"{pair.name}: {error}")
        if on_clip is not None:
            on_clip(done + 1, len(pairs))
    if not clips:
        more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
        raise UserError(f"no clip could be compared: {left_out[0]}{more}")
    return Fidelity(clips=tuple(clips), skipped=tuple(left_out))


def measure(pair: Pair, measures: Sequence[Measure], *, lpips: Lpips | None = None, device: str = "cpu") -> ClipFidelity:
    """Measures of one pair.

    Raises:
        DecodeError: a frame is missing or corrupt.
    """
    facts = pair.facts
    squared, sums = 0, {"ssim": 0.0, "lpips": 0.0}
    runs = zip(runs_of_frames(pair.a, facts), runs_of_frames(pair.b, facts), strict=True) if measures else ()
    with ThreadPoolExecutor() as pool:
        for a, b in runs:
            for start in range(0, a.shape[1], FRAMES_AT_ONCE):
                one, other = (clip[:, start : start + FRAMES_AT_ONCE].transpose(0, 1) for clip in (a, b))
                squared += int((one.int() - other.int()).pow(2).sum(dtype=torch.int64))
                if "ssim" in measures:
                    sums["ssim"] += ssim_of_frames(one, other, pool=pool)
                if "lpips" in measures and lpips is not None:
                    sums["lpips"] += float(lpips(normalise(one.to(device)), normalise(other.to(device))).sum())
    mean_squared = squared / (3 * facts.num_frames * facts.height * facts.width)
    return ClipFidelity(
        name=pair.name,
        num_frames=facts.num_frames,
        height=facts.height,
        width=facts.width,
        psnr=psnr_of(mean_squared) if "psnr" in measures else None,
        ssim=sums["ssim"] / facts.num_frames if "ssim" in measures else None,
        lpips=sums["lpips"] / facts.num_frames if "lpips" in measures else None,
    )


def write_csv(path: Path, clips: Sequence[ClipFidelity]) -> None:
    """One row per clip; a measure that was not asked for is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(asdict(clips[0]))
    with written_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(clip) for clip in clips)


def render(found: Fidelity, *, seed: int = 0) -> None:
    """Print every clip, and the mean of each measure with its interval."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    summaries = found.summaries(seed=seed)
    names = [name for name in MEASURES if any(getattr(clip, name) is not None for clip in found.clips)]
    table = Table("clip", "frames", "size", *(f"{name} (dB)" if name == "psnr" else name for name in names))
    for clip in found.clips[:SHOWN]:
        values = (_digits(name, getattr(clip, name)) for name in names)
        table.add_row(escape(clip.name), str(clip.num_frames), f"{clip.height}x{clip.width}", *values)
    if len(found.clips) > SHOWN:
        table.add_row(f"{len(found.clips) - SHOWN} more (--csv, --json)", *[""] * (2 + len(names)))
    table.add_section()
    rows = (("mean", "mean"), ("std", "std"), ("95 % from", "low"), ("95 % to", "high"))
    for title, attribute in rows if names else ():
        cells = (_digits(name, getattr(summaries[name], attribute) if name in summaries else None) for name in names)
        table.add_row(title, "", "", *cells)
    console = Console()
    console.print(table)
    if found.equal:
        console.print(f"{found.equal} equal in every pixel: infinite PSNR, not in its mean", highlight=False)
    for line in found.skipped:
        console.print(f"skipped {line}", highlight=False, markup=False, soft_wrap=True)


def _digits(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if name == "psnr" else f"{value:.4f}"

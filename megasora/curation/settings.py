"""Settings of the stages, which are their flags on the command line. Standard library only, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megasora.curation.rules import StageName


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How rows are worked on."""

    workers: int | None = None
    """Worker processes; None takes one per core (of the cluster, with --ray)."""
    timeout_s: float = 300.0
    """Longest time for one row; its worker is killed then."""
    memory_gb: float = 4.0
    """Most gigabytes (1e9 bytes) of private memory of a worker."""
    ray: str | None = None
    """Address of a Ray cluster (host:port, ray://host:port or auto), or `local` for one on this machine; None uses local processes."""

    def problems(self) -> str | None:
        """What cannot work, in one line; None when all is well."""
        if self.workers is not None and self.workers < 1:
            return f"--workers {self.workers} must be at least 1"
        if self.timeout_s <= 0 or self.memory_gb <= 0:
            return f"--timeout_s {self.timeout_s:g} and --memory_gb {self.memory_gb:g} must be positive"
        return None


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """Facts of every file of a folder (or of a csv/parquet list with a column path): codec, size, frames, rate, bits per pixel, damage."""

    output: Path
    """Parquet table to write."""
    captions: str = "sidecar"
    """Where captions come from: sidecar (<name>.txt, or <name>.json with "text" or "caption"), none, or a column of the list."""
    overwrite: bool = False
    """Replace a table that is there."""


Detector = Literal["adaptive", "content", "scdet"]


@dataclass(frozen=True, kw_only=True)
class ShotsSettings:
    """Cut probed files into shots of one scene without black borders, as frame ranges or re-encoded."""

    output: Path
    """Parquet table to write."""
    detector: Detector = "adaptive"
    """adaptive and content are PySceneDetect's (adaptive bears camera motion); scdet is libavfilter's, the published tool."""
    threshold: float | None = None
    """Of the detector; None takes its own: adaptive 3 (ratio to the neighbours), content 27 (of 255), scdet 10 (of 100)."""
    max_seconds: float = 8.0
    """Longer shots are cut into pieces of this length. Open-Sora 2.0 report, section 2.1."""
    min_seconds: float = 2.0
    """Shorter pieces are not re-encoded; `filter` drops them. Same source."""
    borders: bool = True
    """Look for black borders and crop them."""
    clips: Path | None = None
    """Folder for re-encoded clips; None keeps frame ranges of the source files."""
    max_fps: float = 30.0
    """Re-encoded clips take every k-th frame so that their rate is at most this. Same source."""
    max_long_side: int = 1080
    """Re-encoded clips are scaled down to this long side, in pixels. Same source."""
    crf: int = 16
    """Quality of re-encoded clips (x264's constant rate factor; 17 and below are visually lossless by FFmpeg's H.264 guide)."""
    overwrite: bool = False
    """Replace a table that is there."""

    def problems(self) -> str | None:
        """What cannot work, in one line; None when all is well."""
        if not 0 < self.min_seconds <= self.max_seconds:
            return f"--min_seconds {self.min_seconds:g} must be positive and at most --max_seconds {self.max_seconds:g}"
        if self.max_fps <= 0 or self.max_long_side < 16 or not 0 <= self.crf <= 51:
            return (
                f"--max_fps {self.max_fps:g} must be positive, --max_long_side {self.max_long_side} at least 16, --crf {self.crf} in 0-51"
            )
        return None


ScoreName = Literal["motion", "blur", "light", "jitter", "text", "hashes", "aesthetic"]


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Score clips of a shots (or probe) table for the filter; a clip that fails keeps its row, with the reason."""

    output: Path
    """Parquet table to write."""
    scores: tuple[ScoreName, ...] = ("motion", "blur", "light", "jitter", "text", "hashes")
    """Which scores. Text boxes cost most (about a second of one core per clip); aesthetic needs --aesthetic."""
    aesthetic: Path | None = None
    """Folder with clip/, head.safetensors and aesthetic.json; see docs/data.md."""
    captioner: str | None = None
    """module:function that captions clips without text: called with (frames uint8 [n, H, W, 3] RGB, row), returns the caption."""
    captioner_frames: int = 8
    """Frames the captioner is given, evenly spaced."""
    overwrite: bool = False
    """Replace a table that is there."""

    def problems(self) -> str | None:
        """What cannot work, in one line; None when all is well."""
        if not self.scores and not self.captioner:
            return f"--scores is empty; choose from {', '.join(get_args(ScoreName))}"
        if ("aesthetic" in self.scores) != (self.aesthetic is not None):
            return "--scores aesthetic and --aesthetic FOLDER go together: the score needs weights, and weights a score"
        if self.captioner is not None and self.captioner.count(":") != 1:
            return f"--captioner {self.captioner!r} must be module:function"
        return None


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """Keep the clips that pass a stage's rules, as a training manifest; removed ones go to <output>.removed.parquet with their reasons."""

    output: Path
    """Manifest to write (parquet)."""
    stage: StageName = "256px"
    """Stage of the pyramid, which sets the defaults of the rules."""
    captions: Path | None = None
    """Table (csv or parquet) with text and id or path: captions that replace those of the input."""
    overwrite: bool = False
    """Replace a manifest that is there."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """One HTML page about a filter run: clips removed by each rule, histograms of the scores, pictures of kept and removed clips."""

    output: Path
    """HTML file to write."""
    examples: int = 6
    """Pictures of kept clips, and of those each rule removed."""
    overwrite: bool = False
    """Replace a page that is there."""

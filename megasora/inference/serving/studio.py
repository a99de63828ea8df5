"""What a page's button does, without the page: a form becomes a clip and its record in a folder, or one line that says what to change."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megasora.config.errors import UserError
from megasora.config.latent_frames import frame_rule
from megasora.config.schema import SampleConfig
from megasora.data.decoding.writer import ending_of
from megasora.inference.refine_settings import RefineConfig
from megasora.inference.refinement import Refinement
from megasora.inference.sampler import Sampler
from megasora.inference.sizes import NAMES

OWN_SIZE, PIXELS = "of the run", "in pixels"
"""Choices of a size that are no resolutions."""
RESOLUTIONS = ("256px", "480p", "720p", "768px")
"""Offered by name; those of hpcaitech/Open-Sora opensora/datasets/aspect.py that its weights are sampled at, and two between them."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a person filled in; as a page gives it, so numbers may be floats and texts empty."""

    prompt: str
    negative: str = ""
    image: str | None = None
    end_image: str | None = None
    resolution: str = OWN_SIZE
    aspect: str = "16:9"
    height: float | None = None
    width: float | None = None
    num_frames: float | None = None
    steps: float | None = None
    guidance: float | None = None
    guidance_img: float | None = None
    motion_score: float | None = None
    seed: float | None = None
    refine: bool = False


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What came of it."""

    clip: Path | None = None
    """mp4, or png of a single frame; None when there is none."""
    record: Path | None = None
    said: str
    """One line: what was drawn, or why nothing was."""

    @property
    def moves(self) -> bool:
        """Whether the clip is a video."""
        return self.clip is not None and self.clip.suffix == ".mp4"


class Studio:
    """Draws one form after another.

    Args:
        sampler: with the weights.
        folder: where clips and records are kept.
        refine: who rewrites prompts, where a form asks for it.
    """

    def __init__(self, sampler: Sampler, *, folder: Path, refine: RefineConfig) -> None:
        self.sampler, self.folder, self.refine = sampler, folder, refine

    @property
    def defaults(self) -> SampleConfig:
        """The run's settings of sampling."""
        return self.sampler.session.config.sample

    @property
    def takes_images(self) -> bool:
        """Whether the weights take given frames."""
        return self.sampler.session.model.cond_embed

    @property
    def unit(self) -> int:
        """Pixels of a token's side."""
        config = self.sampler.session.config
        return config.encoders.spatial_compression * config.model.patch_size

    @property
    def frame_rule(self) -> str:
        """Which numbers of frames the autoencoder takes."""
        encoders = self.sampler.session.config.encoders
        return frame_rule(compression=encoders.temporal_compression, causal=encoders.causal)

    def draw(self, form: Form, *, on_step: Callable[[int, int], None]) -> Drawing:
        """A form's clip; `on_step` gets steps done and their number. What a person can mend is in `said`, nothing is raised for it."""
        try:
            return self._draw(form, on_step)
        except UserError as error:
            return Drawing(said=" ".join(str(error).split()))
        except torch.OutOfMemoryError:
            return Drawing(said="the GPU's memory is too small for this clip; choose a smaller size or fewer frames")

    def _draw(self, form: Form, on_step: Callable[[int, int], None]) -> Drawing:
        settings = _settings(form)
        steps = int(settings.get("steps", self.defaults.steps))
        done = iter(range(1, steps + 1))
        on_step(0, steps)
        clip = self.sampler.sample(
            form.prompt,
            image=form.image or None,
            end_image=form.end_image or None,
            negative=form.negative,
            seed=_whole("seed", form.seed),
            refinement=Refinement(config=self.refine) if form.refine and self.refine.on else None,
            on_step=lambda _: on_step(next(done, steps), steps),
            **_size(form),
            **settings,
        )
        request = clip.request
        name = f"{time.strftime('%Y%m%d_%H%M%S')}_{time.time_ns() % 1_000_000_000 // 1_000_000:03d}_seed{request.seed}"
        path = clip.save(self.folder / f"{name}{ending_of(request.size.num_frames)}")
        size = f"{request.size.num_frames} x {request.size.height} x {request.size.width}"
        said = f"{path.name}: {size}, seed {request.seed}, {clip.drawn.seconds:.1f} s for {clip.drawn.steps} steps"
        if request.refined_from is not None:
            said += f"; prompt: {request.prompt}"
        elif request.refinement is not None:
            said += f"; prompt as it was: {request.refinement.get('failure', 'the answer is the same')}"
        return Drawing(clip=path, record=path.with_suffix(".json"), said=said)


def _size(form: Form) -> dict[str, Any]:
    if form.resolution == OWN_SIZE:
        return {}
    if form.resolution == PIXELS:
        sides = {"height": _whole("height", form.height), "width": _whole("width", form.width)}
        if None in sides.values():
            raise UserError("give height and width together")
        return sides
    if form.aspect not in NAMES:
        raise UserError(f"aspect {form.aspect!r} is not one of {', '.join(NAMES)}")
    return {"resolution": form.resolution, "aspect": form.aspect}


def _settings(form: Form) -> dict[str, Any]:
    """Fields of the sample section that the form sets."""
    steps, frames = _whole("steps", form.steps), _whole("num_frames", form.num_frames)
    if steps is not None and steps < 1:
        raise UserError(f"steps {steps} must be at least 1")
    floats = {name: value for name in ("guidance", "guidance_img", "motion_score") if (value := getattr(form, name)) is not None}
    wholes = {name: value for name, value in (("steps", steps), ("num_frames", frames)) if value is not None}
    return {**{name: float(value) for name, value in floats.items()}, **wholes}


def _whole(name: str, value: float | None) -> int | None:
    if value is None:
        return None
    if value != int(value) or value < 0:
        raise UserError(f"{name} {value:g} is no whole number")
    return int(value)

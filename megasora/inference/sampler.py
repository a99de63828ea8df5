"""The sampler as a Python object: `Sampler.load(weights, vae=..., t5=..., clip=...).sample("A cat")`.

It draws what `megasora sample` draws, on this process's device; in a job of several ranks every rank makes the same calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megasora import recipes
from megasora.checkpoint.source import Select
from megasora.config.errors import UserError
from megasora.config.io import from_dict, to_dict
from megasora.config.schema import RunConfig, SampleConfig
from megasora.data.decoding.writer import ending_of, write_clip
from megasora.inference.given import check_sources
from megasora.inference.record import Hashes, hashes_of, write_record
from megasora.inference.refinement import Refinement, refine
from megasora.inference.requests import ClipRequest, Common, requests_of
from megasora.inference.session import Drawn, Offload, Session, start


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A clip that was drawn."""

    video: Tensor | None
    """fp32 [3, T, H, W] in [-1, 1] in host memory; None on ranks other than the clip's first."""
    latent: Tensor
    """Scaled latent [C, T, H, W]."""
    fps: float
    request: ClipRequest
    drawn: Drawn
    record: Callable[[], dict[str, Any]]
    """What is needed to draw it again; hashes weights and encoders when first called."""

    def save(self, path: str | Path) -> Path:
        """Write the clip (.mp4, or .png for a picture) and its record (.json) beside it; returns the clip's path.

        Raises:
            UserError: another ending, or no pixels on this rank.
        """
        path = Path(path)
        ending = ending_of(self.request.size.num_frames)
        if path.suffix != ending:
            raise UserError(f"{path} must end in {ending}")
        if self.video is None:
            raise UserError("this rank has no pixels: save on the clip's first rank (clip.video is not None)")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, self.video, fps=self.fps)
        write_record(path.with_suffix(".json"), self.record())
        return path


class Sampler:
    """Draws clips with one set of weights; make one with `load`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._hashes: Hashes | None = None

    @classmethod
    def load(
        cls,
        weights: str | Path,
        *,
        vae: str | Path | None = None,
        t5: str | Path | None = None,
        clip: str | Path | None = None,
        recipe: str | RunConfig = "opensora2_stage3",
        select: Select = "model",
        offload: Offload = "none",
        device: str | None = None,
        beside: Sampler | None = None,
    ) -> Sampler:
        """Open weights and encoders; each is loaded when it is needed first.

        Args:
            weights: of any format, or a training checkpoint.
            vae, t5, clip: folders of the encoders; None takes the recipe's.
            recipe: sizes of the model and defaults of sampling: a recipe's name or a run's settings.
            select: which weights of a training checkpoint.
            offload: see `Session`.
            device: cpu or cuda; None takes what there is.
            beside: a sampler of this process whose ranks this one shares.

        Raises:
            UserError: weights, encoders or settings do not fit.
        """
        config = recipes.get(recipe) if isinstance(recipe, str) else recipe
        folders = {name: str(folder) for name, folder in (("vae", vae), ("t5", t5), ("clip", clip)) if folder is not None}
        chosen = {} if device is None else {"device": device}
        config = replace(config, encoders=replace(config.encoders, **folders), **chosen)  # type: ignore[arg-type]
        if beside is None:
            world = start(config)
            if world.groups.count > 1:
                wanted = config.parallel.model_parallel_size * config.sample.guidance_parallel
                raise UserError(
                    f"a Sampler draws one clip at a time: start TP x PP x CP x guidance_parallel = {wanted} rank(s); "
                    "megasora sample deals a table out over more"
                )
        else:
            ours, theirs = config, beside.session.world.config
            if (ours.parallel, ours.sample.guidance_parallel) != (theirs.parallel, theirs.sample.guidance_parallel):
                raise UserError("samplers that share ranks need the same layout: give both the same parallel and sample.guidance_parallel")
            world = replace(beside.session.world, config=replace(config, device=theirs.device))
        return cls(Session(world, weights=Path(weights), select=select, offload=offload))

    def sample(
        self,
        prompt: str,
        *,
        image: str | Path | None = None,
        end_image: str | Path | None = None,
        video: str | Path | None = None,
        kind: str | None = None,
        negative: str = "",
        resolution: str | None = None,
        aspect: str | None = None,
        seed: int | None = None,
        refinement: Refinement | None = None,
        on_step: Callable[[int], None] | None = None,
        **settings: Any,
    ) -> Clip:
        """Draw a clip.

        Args:
            prompt: what it shows.
            image, end_image, video: files of given frames.
            kind: what they are (`megasora sample --help`); None takes what the files mean.
            negative: what it should not look like.
            resolution, aspect: its size by name: 768px, 16:9.
            seed: of its noise; None takes the settings'.
            refinement: who rewrites the prompt first; None draws it as it is.
            on_step: called after each step.
            settings: fields of the run's sample section for this clip: num_frames, height, width, steps, guidance, ...

        Raises:
            UserError: a setting or a file is not what it needs to be.
        """
        whole: SampleConfig = from_dict({**to_dict(self.session.config.sample), **settings}, SampleConfig, path="sample")
        session = self.session.using(whole)
        row = {"prompt": prompt, "seed": seed, "kind": kind, **_files(image=image, end_image=end_image, video=video)}
        common = Common(kind=None, negative=negative, resolution=resolution, aspect=aspect, num_samples=1)
        (request,) = requests_of(row, number=0, config=session.config, common=common, folder=Path())
        session.check(request)
        check_sources(request, session.config.encoders)
        if refinement is not None:
            (request,) = refine([request], refinement)
        latent, drawn = session.draw(request, session.prompt(request), on_step=on_step)
        pixels = session.decode(latent, kind=request.kind)
        return Clip(
            video=None if pixels is None else pixels.cpu(),
            latent=latent.cpu(),
            fps=whole.fps,
            request=request,
            drawn=drawn,
            record=lambda: self._record(session, request, drawn),
        )

    def _record(self, session: Session, request: ClipRequest, drawn: Drawn) -> dict[str, Any]:
        self._hashes = self._hashes or hashes_of(session.source.path, session.config)
        return {**session.record(request, self._hashes), "made": to_dict(drawn)}


def _files(**paths: str | Path | None) -> dict[str, str]:
    return {name: str(path) for name, path in paths.items() if path is not None}

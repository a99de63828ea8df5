"""`megasora sample`: prompts, pictures and clips to mp4, on one rank or in any layout; the seed gives the same clip in all.

A clip that is there already and was made from the same is kept, so an interrupted table goes on where it ended. The first rank of a clip
decides what is there, reads nothing twice, and writes; beside each clip stands its record.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress

from megasora.checkpoint.source import Select
from megasora.config.errors import UserError
from megasora.config.io import from_dict, to_dict
from megasora.config.schema import EncodersConfig, FlowConfig, RunConfig, SampleConfig
from megasora.data.decoding.writer import contact_sheet, ending_of, write_clip, write_picture
from megasora.inference.first_frames import FirstFrames, draw_first_frames
from megasora.inference.given import check_sources
from megasora.inference.record import Hashes, differences, hashes_of, read_record, write_record
from megasora.inference.refinement import Refinement, refine
from megasora.inference.requests import ClipRequest, Common, Unusable, read_requests, requests_of
from megasora.inference.search import NoiseSearch, score
from megasora.inference.session import Drawn, Offload, Session, World, start
from megasora.models.sampler import Prompt


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked for, of the command line."""

    prompt: tuple[str, ...] = ()
    table: Path | None = None
    again: Path | None = None
    """The record of a clip to make again."""
    image: Path | None = None
    end_image: Path | None = None
    video: Path | None = None
    common: Common
    share: tuple[int, int] = (0, 1)
    """(i, n): of the table, rows i, i + n, ..."""


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What is written beside the clips, and how they are chosen."""

    save_latents: bool = False
    """Each clip's scaled latent, as safetensors."""
    preview: bool = False
    """A contact sheet of each clip, as PNG."""
    search: NoiseSearch = field(default_factory=NoiseSearch)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the clips, over all ranks, in the order they were asked for."""

    made: tuple[Path, ...] = ()
    kept: tuple[Path, ...] = ()
    """Were there already."""
    failed: tuple[Unusable, ...] = field(default=())


def run_sample(
    config: RunConfig,
    wanted: Wanted,
    *,
    weights: Path,
    output: Path,
    select: Select = "model",
    offload: Offload = "none",
    first_frames: FirstFrames | None = None,
    extras: Extras | None = None,
    refinement: Refinement | None = None,
) -> Outcome:
    """Draw the clips that are asked for into a folder.

    Args:
        config: settings; its sample section is what all clips have in common.
        wanted: the clips.
        weights, select: of any format, and which of a training checkpoint's.
        output: folder of the clips.
        offload: see `Session`.
        first_frames: draw the first frames of text-to-video clips with other weights; None goes from text to video.
        extras: what is written beside the clips, and how they are chosen.
        refinement: who rewrites the prompts before they are drawn; None leaves them as they are.

    Raises:
        UserError: settings, weights or files do not fit, or a clip of that name was made from something else.
    """
    remembered = None if wanted.again is None else read_record(wanted.again)
    if remembered is not None:
        if refinement is not None:
            raise UserError("--again draws the text of the record; leave out --refine and --motion_score dynamic")
        config = _settings_of(remembered, config)
    requests, failed = _requests(config, wanted, remembered)
    world = start(config)
    config = world.config
    session = Session(world, weights=weights, select=select, offload=offload)
    for request in requests:
        session.check(request)
    requests, unreadable = _readable(requests, world, one_by_one=wanted.table is not None)
    if refinement is not None:
        requests = refine(requests, refinement, folder=output, first_frames=first_frames is not None)
    own = requests[world.groups.number :: world.groups.count]
    with Progress(disable=dist.get_rank() != 0, transient=True) as progress:
        task = progress.add_task("sample", total=len(own) * config.sample.steps * (2 if first_frames else 1))
        maker = _Maker(session, output=output, extras=extras or Extras())
        if first_frames is not None:
            texts = [(one.picture_prompt or one.prompt, session.caption(one), one.negative) for one in own]
            session.shelf.encode_texts([text for three in texts for text in three])
            own = draw_first_frames(
                world,
                own,
                settings=first_frames,
                shelf=session.shelf,
                offload=offload,
                folder=output / "first_frames",
                clip_hashes=maker.hashes,
                on_step=lambda _: progress.advance(task),
            )
        if remembered is not None:
            maker.insist_on(remembered, own)
        made, kept = maker.make(own, on_step=lambda _: progress.advance(task))
    return _gathered(Outcome(made=tuple(made), kept=tuple(kept)), requests, failed=(*failed, *unreadable), output=output)


class _Maker:
    """Draws, decodes and writes this rank's clips."""

    def __init__(self, session: Session, *, output: Path, extras: Extras) -> None:
        self.session, self.output, self.extras = session, output, extras
        self._scorer = extras.search.load()
        self.world: World = session.world
        self._hashes: Hashes | None = None
        self._hashing = threading.Thread(target=self._hash, daemon=True)  # while texts are encoded and weights are loaded
        if self.world.leads:
            self._hashing.start()

    def _hash(self) -> None:
        self._hashes = hashes_of(self.session.source.path, self.world.config)

    def hashes(self) -> Hashes:
        """Of weights and encoders, on a clip's first rank."""
        self._hashing.join()
        if self._hashes is None:  # the thread failed: fail here, in its words
            self._hash()
        assert self._hashes is not None
        return self._hashes

    def record(self, request: ClipRequest) -> dict[str, Any]:
        """The clip's record, on its first rank."""
        return self.session.record(request, self.hashes())

    def insist_on(self, remembered: dict[str, Any], requests: Sequence[ClipRequest]) -> None:
        """Refuse to make another clip than the remembered one.

        Raises:
            UserError: weights, encoders, given files or settings differ.
        """
        for request in requests if self.world.leads else ():
            if different := differences(self.record(request), remembered):
                raise UserError(f"the clip cannot be made again from this: {'; '.join(different[:3])}")

    def make(self, requests: Sequence[ClipRequest], *, on_step: Any) -> tuple[list[Path], list[Path]]:
        """(clips made, clips that were there), as paths."""
        session, (todo, kept) = self.session, self._left(requests)
        session.shelf.encode_texts([text for request in todo for text in (session.caption(request), request.negative)])
        if session.offload != "none":
            session.shelf.drop_text_encoders()
        prompts = [session.prompt(request) for request in todo]
        made: list[Path] = []
        for request, prompt in zip(todo, prompts, strict=True):
            self._make(request, prompt, on_step=on_step)
            made.append(self._path(request))
        return made, kept

    def _make(self, request: ClipRequest, prompt: Prompt, *, on_step: Any) -> None:
        """Draw a clip, or several of which the best is kept, and write it."""
        search = self.extras.search
        best: tuple[ClipRequest, torch.Tensor, torch.Tensor, Drawn] | None = None
        scores: list[float] = []
        for k in range(search.best_of):
            candidate = replace(request, seed=request.seed + k)
            latent, drawn = self.session.draw(candidate, prompt, on_step=on_step)
            video = self.session.decode(latent, kind=request.kind)
            if video is None:
                continue  # the clip's first rank has it, scores it and writes it
            if self._scorer is not None:
                scores.append(score(self._scorer, video.cpu(), request.prompt, name=str(search.scorer)))
            if best is None or scores[-1] > max(scores[:-1]):
                best = (candidate, video, latent, drawn)
        if best is not None:
            found = {**search.facts(request), "scores": scores} if self._scorer is not None else {}
            self._write(*best, search=found)

    def _left(self, requests: Sequence[ClipRequest]) -> tuple[list[ClipRequest], list[Path]]:
        """The clips that are not there yet, and the paths of the others; the clip's first rank looks, so that all its ranks agree."""
        states = self.world.agreed(lambda: [self._is_there(request) for request in requests])
        for state in states:
            if isinstance(state, str):
                raise UserError(state)
        there = list(zip(requests, states, strict=True))
        return [request for request, is_there in there if not is_there], [self._path(request) for request, is_there in there if is_there]

    def _is_there(self, request: ClipRequest) -> bool | str:
        """Whether the clip is there, or why it may not be replaced."""
        path = self._path(request)
        if not path.is_file() or not path.with_suffix(".json").is_file():
            return False
        there = read_record(path.with_suffix(".json"))
        searched = {key: value for key, value in there.get("search", {}).items() if key != "scores"}
        if searched == self.extras.search.facts(request) != {}:
            request = replace(request, seed=int(there["seed"]))
        different = differences(self.record(request), there)
        return f"{path} was made from something else ({different[0]}); choose another --output or name" if different else True

    def _path(self, request: ClipRequest) -> Path:
        return self.output / f"{request.name}{ending_of(request.size.num_frames)}"

    def _write(self, request: ClipRequest, video: torch.Tensor, latent: torch.Tensor, drawn: Drawn, *, search: dict[str, Any]) -> None:
        path = self._path(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.extras.preview and request.size.num_frames > 1:
            write_picture(path.with_suffix(".preview.png"), contact_sheet(video))
        if self.extras.save_latents:
            from safetensors.torch import save_file

            save_file({"latent": latent.cpu().contiguous()}, path.with_suffix(".safetensors"))
        write_clip(path, video, fps=self.session.config.sample.fps)
        write_record(path.with_suffix(".json"), {**self.record(request), "made": to_dict(drawn), **({"search": search} if search else {})})


def _requests(config: RunConfig, wanted: Wanted, remembered: dict[str, Any] | None) -> tuple[list[ClipRequest], list[Unusable]]:
    """The clips asked for, by exactly one of prompts, table and record."""
    asked = [name for name, given in (("--prompt", wanted.prompt), ("--table", wanted.table), ("--again", remembered)) if given]
    if len(asked) != 1:
        raise UserError(f"give one of --prompt, --table and --again{', not ' + ' and '.join(asked) if asked else ''}")
    if wanted.common.num_samples < 1:
        raise UserError(f"--num_samples {wanted.common.num_samples} must be at least 1")
    if wanted.table is not None:
        if wanted.image or wanted.end_image or wanted.video:
            raise UserError("with --table, images and videos are columns of the table (image, end_image, video)")
        requests, unusable = read_requests(wanted.table, config=config, common=wanted.common)
        task, tasks = wanted.share
        return [r for r in requests if r.row % tasks == task], [one for one in unusable if one.row % tasks == task]
    here = Path()
    if remembered is not None:
        paths = {name: remembered["paths"].get(name) for name in ("image", "end_image", "video")}
        row = {**paths, **remembered["size"], **{name: remembered[name] for name in ("prompt", "negative", "kind", "seed")}}
        assert wanted.again is not None
        row["name"] = wanted.again.stem
        common = replace(wanted.common, num_samples=1, kind=None)
        (request,) = requests_of(row, number=0, config=config, common=common, folder=here)
        return [replace(request, refined_from=remembered.get("refined_from"), refinement=remembered.get("refinement"))], []
    files = {"image": wanted.image, "end_image": wanted.end_image, "video": wanted.video}
    rows = [{"prompt": prompt, **files} for prompt in wanted.prompt]
    common = wanted.common
    return [r for n, row in enumerate(rows) for r in requests_of(row, number=n, config=config, common=common, folder=here)], []


def _settings_of(record: dict[str, Any], config: RunConfig) -> RunConfig:
    """The run's settings with the record's, which decide the clip."""
    sample = {**to_dict(config.sample), **record["sample"]}
    encoders = replace(config.encoders, **record["encoding"])
    data = replace(config.data, text_tokens=record["text_tokens"])
    flow: FlowConfig = from_dict(record["flow"], FlowConfig, path="record.flow")
    return replace(config, sample=from_dict(sample, SampleConfig, path="record.sample"), encoders=encoders, data=data, flow=flow)


def _readable(requests: list[ClipRequest], world: World, *, one_by_one: bool) -> tuple[list[ClipRequest], list[Unusable]]:
    """Requests whose files can be read; rank 0 looks, so that all ranks draw the same clips.

    Raises:
        UserError: a file cannot be read and there is no table whose other rows could be drawn.
    """
    reasons: list[Any] = [None]
    if dist.get_rank() == 0:
        reasons = [[_reason(request, world.config.encoders) for request in requests]]
    dist.broadcast_object_list(reasons, src=0)
    pairs = list(zip(requests, reasons[0], strict=True))
    bad = {request.row: reason for request, reason in pairs if reason is not None}
    if bad and not one_by_one:
        raise UserError(next(iter(bad.values())))
    return [request for request, reason in pairs if reason is None], [Unusable(row=row, reason=reason) for row, reason in bad.items()]


def _reason(request: ClipRequest, encoders: EncodersConfig) -> str | None:
    try:
        check_sources(request, encoders)
    except UserError as error:
        return str(error)
    return None


def _gathered(own: Outcome, requests: Sequence[ClipRequest], *, failed: tuple[Unusable, ...], output: Path) -> Outcome:
    """All ranks' clips, in the order they were asked for."""
    every: list[Outcome | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    made = {path for outcome in every if outcome is not None for path in outcome.made}
    kept = {path for outcome in every if outcome is not None for path in outcome.kept}
    order = [output / f"{request.name}{ending_of(request.size.num_frames)}" for request in requests]
    return Outcome(made=tuple(path for path in order if path in made), kept=tuple(path for path in order if path in kept), failed=failed)

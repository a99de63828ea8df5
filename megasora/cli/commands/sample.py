"""`megasora sample`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megasora.cli.endings import Answer, lines, rank
from megasora.cli.recipe_arguments import RecipeArgs, config_defaults
from megasora.config.errors import UserError
from megasora.inference.refine_settings import RefineConfig

if TYPE_CHECKING:
    from megasora.inference.sample import Outcome


@dataclass(frozen=True, kw_only=True)
class Args(RecipeArgs):
    """Text, pictures and clips to mp4, on one rank or in any layout; the seed gives the same clip in all.

    A clip that is there already is kept, so the same command goes on with an interrupted table. With --t2i_weights the first frame of every
    text-to-video clip is drawn by FLUX.1-dev, which gives the best clips.
    """

    weights: Path
    """Weights of any format, or a training checkpoint."""
    output: Path
    """Folder of the clips; a .json beside each says how it was made."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    table: Path | None = None
    """csv, parquet, json or jsonl with a clip per row; columns prompt, negative, image, end_image, video, kind, seed, resolution, aspect,
    height, width, num_frames, name (or Open-Sora's text, neg, ref)."""
    again: Path | None = None
    """The .json beside a clip: make that clip again."""
    image: Path | None = None
    """First frame (i2v_head; with --end_image i2v_loop)."""
    end_image: Path | None = None
    """Last frame (i2v_tail)."""
    video: Path | None = None
    """Clip to go on from (v2v_head: its first 33 frames are given)."""
    kind: Literal["t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy"] | None = None
    """What the given frames are; None takes what the files mean. v2v_tail gives the last 33 frames, _easy 65."""
    negative: str = ""
    """What the clip should not look like."""
    num_samples: int = 1
    """Clips per prompt, with seeds that follow one another."""
    select: Literal["model", "ema"] = "model"
    """Which weights of a training checkpoint."""
    resolution: str | None = None
    """Size by name, with --aspect: 256px, 768px, 720p."""
    aspect: str | None = None
    """Aspect ratio, width:height: 16:9, 1:1, 9:16, 2.39:1, ..."""
    height: int | None = None
    """Pixels; None takes --sample.height. So with the next five."""
    width: int | None = None
    """Pixels."""
    num_frames: int | None = None
    """Frames: 1 or 4k+1; 1 or 4k from 8 on with the video DC-AE."""
    fps: float | None = None
    """Frames per second of the clip."""
    steps: int | None = None
    """Euler steps."""
    motion_score: float | Literal["dynamic"] | None = None
    """How much moves, 1 to 15, told to the model; dynamic asks --refine for each clip's; None takes --sample.motion_score."""
    refine: RefineConfig = field(default_factory=RefineConfig)
    """Let a language model rewrite the prompts; off without --refine.url or --refine.function."""
    seed: int | None = None
    """Seed of the first clip's noise; the next ones take the next."""
    t2i_weights: Path | None = None
    """FLUX.1-dev, to draw first frames."""
    t2i_vae: Path | None = None
    """FLUX's 2D autoencoder: ae.safetensors, or a diffusers folder."""
    t2i_resolution: str = "768px"
    """Resolution at which first frames are drawn."""
    offload: Literal["none", "encoders", "model"] = "none"
    """What waits in host memory while it is not needed: encoders (text encoders are dropped, the autoencoder waits); model (that too)."""
    shard: str | None = None
    """i/n: draw the table's rows k with k % n = i. None takes SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, or 0/1 without them."""
    save_latents: bool = False
    """Also write each clip's latent as .safetensors."""
    preview: bool = False
    """Also write a contact sheet of each clip: .preview.png."""
    best_of: int = 1
    """Draw this many clips for each that is kept, with seeds that follow one another; needs --scorer."""
    scorer: str | None = None
    """MODULE:FUNCTION that says how good a clip is: (clip [3, T, H, W] in [-1, 1], prompt) -> number, the higher the better."""
    json: bool = False
    """Print the files as JSON."""


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return config_defaults(words, command="sample")


def run(args: Args) -> Answer | None:
    """Write the clips; exit code 1 when a row of the table could not be drawn."""
    from megasora.config.array_task import task_of
    from megasora.inference.first_frames import FirstFrames
    from megasora.inference.refinement import Refinement
    from megasora.inference.requests import Common
    from megasora.inference.sample import Extras, Wanted, run_sample
    from megasora.inference.search import NoiseSearch

    if (args.t2i_weights is None) != (args.t2i_vae is None):
        raise UserError("first frames need both --t2i_weights and --t2i_vae")
    names = ("height", "width", "num_frames", "fps", "steps", "seed")
    chosen = {name: value for name in names if (value := getattr(args, name)) is not None}
    dynamic = args.motion_score == "dynamic"
    if args.motion_score is not None and not dynamic:
        chosen["motion_score"] = args.motion_score
    refinement = Refinement(config=args.refine, motion_score=dynamic)
    refinement.check()
    first_frames = None
    if args.t2i_weights is not None and args.t2i_vae is not None:
        first_frames = FirstFrames(weights=args.t2i_weights, vae=args.t2i_vae, resolution=args.t2i_resolution)
    common = Common(kind=args.kind, negative=args.negative, resolution=args.resolution, aspect=args.aspect, num_samples=args.num_samples)
    outcome = run_sample(
        replace(args.config, sample=replace(args.config.sample, **chosen)),
        Wanted(
            prompt=args.prompt,
            table=args.table,
            again=args.again,
            image=args.image,
            end_image=args.end_image,
            video=args.video,
            common=common,
            share=task_of(args.shard, os.environ),
        ),
        weights=args.weights,
        output=args.output,
        select=args.select,
        offload=args.offload,
        first_frames=first_frames,
        refinement=refinement if args.refine.on else None,
        extras=Extras(save_latents=args.save_latents, preview=args.preview, search=NoiseSearch(best_of=args.best_of, scorer=args.scorer)),
    )
    return _answer(outcome) if rank() == 0 else None


def _answer(outcome: Outcome) -> Answer:
    data = {
        "made": [str(path) for path in outcome.made],
        "kept": [str(path) for path in outcome.kept],
        "failed": [{"row": one.row, "reason": one.reason} for one in outcome.failed],
    }
    return Answer(data=data, show=lines(_words(outcome)), exit_code=1 if outcome.failed else 0)


def _words(outcome: Outcome) -> Iterator[str]:
    yield from map(str, outcome.made)
    if outcome.kept:
        yield f"{len(outcome.kept)} clip(s) were there already: {outcome.kept[0]}{', ...' if len(outcome.kept) > 1 else ''}"
    if outcome.failed:
        yield f"{len(outcome.failed)} clip(s) could not be drawn:"
        yield from (f"  row {one.row}: {one.reason}" for one in outcome.failed)

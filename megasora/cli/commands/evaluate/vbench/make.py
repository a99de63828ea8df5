"""`megasora evaluate vbench make`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megasora.cli.endings import Answer, file_errors, lines, rank
from megasora.cli.progress import row_bar
from megasora.cli.recipe_arguments import RecipeArgs, config_defaults

if TYPE_CHECKING:
    from megasora.evaluation.vbench.making import Draw

PLAN = "vbench_plan.csv"


@dataclass(frozen=True, kw_only=True)
class Args(RecipeArgs):
    """The clips VBench wants, `{prompt}-{index}.mp4`; what stands there whole is skipped, so the same command goes on.

    Sizes, steps and the base seed are the recipe's: --sample.height, --sample.steps, --sample.seed. Under torchrun in any layout.
    """

    weights: Path
    """Weights of any format, or a training checkpoint."""
    prompts: Path
    """VBench's prompts/all_dimension.txt, its folder prompts/prompts_per_dimension, or vbench/VBench_full_info.json."""
    output: Path
    """Folder of the clips and of vbench_plan.csv, which holds every clip's seed."""
    per_dimension: bool = False
    """A folder for each prompt list."""
    samples: int = 5
    """Clips of a prompt."""
    flicker_samples: int = 25
    """Clips of a prompt of temporal_flickering, of which VBench's static filter keeps five; needs the lists."""
    shard: str | None = None
    """i/n: make the clips k with k % n = i. None takes SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, or 0/1 without them."""
    select: Literal["model", "ema"] = "model"
    """Which weights of a training checkpoint."""
    json: bool = False
    """Print JSON."""


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return config_defaults(words, command="evaluate vbench make")


def run(args: Args) -> Answer | None:
    """Make what is missing of this task's share."""
    from megasora.config.array_task import task_of
    from megasora.evaluation.files import ClipFacts
    from megasora.evaluation.vbench.making import make_clips
    from megasora.evaluation.vbench.prompts import plan_clips, read_prompts, write_plan

    sample = args.config.sample
    task = task_of(args.shard, os.environ)
    plan = plan_clips(
        read_prompts(args.prompts),
        samples=args.samples,
        flicker_samples=args.flicker_samples,
        per_dimension=args.per_dimension,
        seed=sample.seed,
    )
    facts = ClipFacts(num_frames=sample.num_frames, height=sample.height, width=sample.width)
    with file_errors(f"run the same command again and {args.output} goes on"), row_bar("clips") as bar:
        if rank() == 0:
            write_plan(args.output / PLAN, plan)
        made = make_clips(
            plan,
            args.output,
            draw=_drawing(args, args.output / f".drawing_{task[0]}_of_{task[1]}.mp4"),
            facts=facts,
            task=task,
            on_clip=(lambda done, total: bar.update(done, total, 0)) if rank() == 0 else None,
        )
    if rank() != 0:
        return None
    told = [f"{args.output}: {made.made} clips made, {made.kept} kept, share {task[0]}/{task[1]} of {made.planned}"]
    told += [f"made again, what stood there was broken: {path}" for path in made.remade]
    return Answer(data={"output": str(args.output), "shard": list(task), **asdict(made)}, show=lines(told))


def _drawing(args: Args, scratch: Path) -> Draw:
    """How a clip is drawn: by `megasora.Sampler`, loaded at the first clip, under a short name that is exchanged when it is whole."""
    from megasora.data.decoding.writer import write_video
    from megasora.evaluation.vbench.prompts import PlannedClip
    from megasora.inference.sampler import Sampler

    loaded: list[Sampler] = []

    def draw(clip: PlannedClip, path: Path) -> None:
        if not loaded:
            loaded.append(Sampler.load(args.weights, recipe=args.config, select=args.select))
        made = loaded[0].sample(clip.prompt, seed=clip.seed)
        if made.video is not None:
            write_video(scratch, made.video, fps=made.fps)
            scratch.replace(path)

    return draw

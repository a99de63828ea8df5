"""`megasora plan`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megasora.cli.endings import Answer, file_errors
from megasora.cli.progress import row_bar
from megasora.cli.recipe_arguments import RecipeArgs, config_defaults, config_named, name_elsewhere
from megasora.config.errors import UserError
from megasora.config.files import written_whole
from megasora.config.schema import RunConfig
from megasora.perf.hardware import Hardware, load_hardware
from megasora.scaling.plan.space import Space
from megasora.scaling.settings import Clips, Failures


@dataclass(frozen=True, kw_only=True)
class Args(RecipeArgs):
    """Which layouts of a recipe fit a number of GPUs, how fast they are expected to be and what they cost; no GPU is needed.

    Every figure is a forecast from the hardware profile: megasora study calibrate measures one, megasora study compares.
    """

    gpus: int
    """GPUs of the job."""
    gpu: str = "h200"
    """Profile of GPU and network: h100, h200, a100, b200, gb200, h100_pcie, changed after a colon (h200:ib200,price=1.8), or a file."""
    price: float | None = None
    """Dollars per GPU and hour; None takes the profile's."""
    clips: Clips = "auto"
    """What fills the steps: the recipe's manifest, its largest clips, or clips drawn through its buckets. auto: the manifest if given."""
    plan_steps: int = 1
    """Steps that are looked at: with clips of many shapes a forecast is the mean of several."""
    best: int = 10
    """Layouts to show."""
    keep_batch: bool = True
    """Keep the recipe's tokens per step whatever the number of GPUs; otherwise they grow with the GPUs beyond --batch_gpus."""
    batch_gpus: int = 224
    """GPUs that the recipe's tokens per step were meant for, with --no_keep_batch."""
    failures: Failures = field(default_factory=Failures)
    space: Space = field(default_factory=Space)
    sbatch: Path | None = None
    """Write the best layout's file for Slurm there."""
    json: bool = False
    """Print the plans as JSON."""


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return config_defaults(words, command="plan")


def run(args: Args) -> Answer:
    """The plans; exit code 1 where none fits."""
    for name in ("gpus", "plan_steps", "best", "batch_gpus"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be a positive number")
    hardware = _hardware(args)
    from megasora.scaling.plan import report
    from megasora.scaling.plan.search import Question, search

    question = Question(
        config=_config(args),
        gpus=args.gpus,
        hardware=hardware,
        failures=args.failures,
        clips=args.clips,
        steps=args.plan_steps,
        best=args.best,
        space=args.space,
    )
    with row_bar("layouts") as bar:
        answer = search(question, told=lambda done, of: bar.update(done, of, 0))
    if args.sbatch is not None and answer.plans:
        _write_sbatch(args, answer.plans[0].config)
    base = config_named(args.source)
    return Answer(
        data=report.as_data(answer, base=base),
        show=lambda: report.show(answer, base=base, source=args.source),
        exit_code=0 if answer.plans else 1,
    )


def _hardware(args: Args) -> Hardware:
    hardware = load_hardware(args.gpu)
    if args.price is not None and args.price < 0:
        raise UserError(f"--price {args.price} must not be negative")
    return hardware if args.price is None else replace(hardware, dollars_per_gpu_hour=args.price)


def _config(args: Args) -> RunConfig:
    """The recipe with its batch."""
    config = args.config
    if args.keep_batch:
        return config
    tokens = round(config.data.global_tokens * args.gpus / args.batch_gpus)
    return replace(config, data=replace(config.data, global_tokens=tokens))


def _write_sbatch(args: Args, config: RunConfig) -> None:
    """The best layout as a job file, as `megasora slurm render` writes it."""
    import shlex

    from megasora.slurm.flags import changed_flags
    from megasora.slurm.job import SlurmJob
    from megasora.slurm.template import GIVEN, render

    per_node = min(args.gpus, load_hardware(args.gpu).gpus_per_node)
    if args.gpus % per_node:
        raise UserError(f"--gpus {args.gpus} does not fill nodes of {per_node} GPUs, as --sbatch needs")
    job = SlurmJob(
        recipe=name_elsewhere(args.source),
        config=config,
        flags=tuple(changed_flags(config_named(args.source), config, without=GIVEN)),
        command=shlex.join(["megasora", "plan", *sys.argv[2:]]),
        nodes=args.gpus // per_node,
        gpus_per_node=per_node,
    )
    with file_errors(), written_whole(args.sbatch) as temporary:  # type: ignore[arg-type]
        temporary.write_text(render(job))

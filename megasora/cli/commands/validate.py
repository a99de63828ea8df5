"""`megasora validate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megasora.cli.endings import Answer
from megasora.cli.recipe_arguments import RecipeArgs, config_defaults
from megasora.config.errors import UserError
from megasora.config.io import to_dict
from megasora.config.parameters import parameter_count
from megasora.config.pipeline_split import chunk_lengths, stage_parameters
from megasora.config.schema import RunConfig
from megasora.config.validate import model_state_bytes, problems


@dataclass(frozen=True, kw_only=True)
class Args(RecipeArgs):
    """The checks of train, without ranks: every problem at once, each with its cure."""

    gpus: int = 1
    """World size to check for."""
    json: bool = False
    """Print the problems as JSON."""


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return config_defaults(words, command="validate")


def run(args: Args) -> Answer:
    """Exit code 2 when there are problems."""
    if args.gpus < 1:
        raise UserError(f"--gpus {args.gpus} must be a positive number")
    found = problems(args.config, world_size=args.gpus)
    if found and not args.json:
        raise UserError("\n  ".join([f"{len(found)} problem(s)", *map(str, found)]))
    data = {"problems": [to_dict(problem) for problem in found]}
    return Answer(data=data, show=lambda: _show(args.config, args.gpus), exit_code=2 if found else 0)


def _show(config: RunConfig, gpus: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{config.recipe} on {gpus} GPU(s): no problems", show_header=False)
    parallel = config.parallel
    table.add_row("parameters", f"{parameter_count(config.model):,}")
    if parallel.pipeline_model_parallel_size > 1:
        table.add_row("blocks per chunk, in pipeline order", " ".join(map(str, chunk_lengths(config.model, parallel))))
        table.add_row("parameters per stage", " ".join(f"{count / 1e9:.2f} B" for count in stage_parameters(config.model, parallel)))
    table.add_row("data parallel size", str(gpus // parallel.model_parallel_size))
    table.add_row("weights, gradients, optimizer, EMA", f"{model_state_bytes(config, world_size=gpus) / 1e9:.1f} GB on the fullest GPU")
    table.add_row("tokens per step", f"{config.data.global_tokens:,}")
    Console().print(table)

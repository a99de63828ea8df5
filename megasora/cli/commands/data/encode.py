"""`megasora data encode`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from megasora.cli.endings import Answer, file_errors, lines, rank
from megasora.cli.progress import row_bar
from megasora.cli.recipe_arguments import RecipeArgs, config_defaults
from megasora.config.io import to_dict
from megasora.training.encode.settings import EncodeSettings

EXTRA = "data"


@dataclass(frozen=True, kw_only=True)
class Args(RecipeArgs):
    """Latents, condition frames and text of every planned clip, encoded once into shards that `--data.cache` reads."""

    settings: Annotated[EncodeSettings, tyro.conf.arg(name="")]
    json: bool = False
    """Print JSON."""


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return config_defaults(words, command="data encode")


def run(args: Args) -> Answer | None:
    """Write this task's shards; under torchrun its ranks share out each clip."""
    from megasora.training.encode.run import run_encode

    interrupted = f"interrupted; finished shards are kept in {args.settings.output}: the same command goes on"
    with row_bar("encode") as bar, file_errors(interrupted):
        result = run_encode(
            args.config,
            args.settings,
            on_start=lambda size: None if args.json else print(size.line),
            on_progress=lambda done, total, _: bar.update(done, total, 0),
        )
    return Answer(data=to_dict(result), show=lines(_lines(result))) if rank() == 0 else None


def _lines(result: Any) -> list[str]:
    rate = result.samples / result.seconds if result.seconds else 0.0
    said = [
        f"{result.output}: {len(result.made)} shards made with {result.samples:,} clips, {result.bytes_written / 1e9:.2f} GB in "
        f"{result.seconds:.0f} s ({rate:.1f} clips a second); {len(result.kept)} were there"
    ]
    if result.failed:
        said.append(f"{result.failed:,} clips could not be encoded; the reasons stand in the shards' failed.jsonl")
    if result.unplanned:
        said.append(f"{result.unplanned:,} rows of the manifest fit no shape; the reasons stand in unplanned.jsonl")
    if result.missing:
        said.append(f"{len(result.missing)} shards of other tasks are not finished yet")
    return said

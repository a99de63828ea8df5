"""`megasora data encode`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from megasora.cli.endings import Answer, file_errors, lines, rank
from megasora.cli.progress import row_bar
from megasora.cli.recipe_arguments import AutoencoderArgs, RecipeArgs, autoencoder_defaults, config_defaults, names_autoencoder
from megasora.config.io import to_dict
from megasora.training.encode.settings import EncodeSettings, TeacherEncodeSettings

EXTRA = "data"


@dataclass(frozen=True, kw_only=True)
class Args(RecipeArgs):
    """Latents, condition frames and text of every planned clip, encoded once into shards that `--data.cache` reads."""

    settings: Annotated[EncodeSettings, tyro.conf.arg(name="")]
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class OfAutoencoder(AutoencoderArgs):
    """The teacher's features of every clip of a run of train-ae with distillation, once, into shards that `--distillation.cache` reads."""

    settings: Annotated[TeacherEncodeSettings, tyro.conf.arg(name="")]
    json: bool = False
    """Print JSON."""


OTHERS = (OfAutoencoder,)


def kind_of(words: Sequence[str]) -> type:
    """Of a recipe of a diffusion transformer, or of an autoencoder."""
    return OfAutoencoder if names_autoencoder(words) else Args


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return (autoencoder_defaults if names_autoencoder(words) else config_defaults)(words, command="data encode")


def _of_autoencoder(args: OfAutoencoder) -> Answer:
    from megasora.training.encode.teacher import encode_teacher

    interrupted = f"interrupted; finished shards are kept in {args.settings.output}: the same command goes on"
    with row_bar("encode") as bar, file_errors(interrupted):
        result = encode_teacher(
            args.config,
            args.settings,
            on_start=lambda line: None if args.json else print(line),
            on_progress=lambda done, total, _: bar.update(done, total, 0),
        )
    return Answer(data=to_dict(result), show=lines(_lines(result)))


def run(args: Args | OfAutoencoder) -> Answer | None:
    """Write this task's shards; of latents and text, under torchrun its ranks share out each clip."""
    if isinstance(args, OfAutoencoder):
        return _of_autoencoder(args)
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

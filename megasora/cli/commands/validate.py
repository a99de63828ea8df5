"""`megasora validate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megasora.cli.endings import Answer, lines
from megasora.cli.recipe_arguments import AutoencoderArgs, RecipeArgs, autoencoder_defaults, config_defaults, names_autoencoder
from megasora.config.autoencoder_checks import autoencoder_problems
from megasora.config.errors import UserError
from megasora.config.io import to_dict
from megasora.config.memory import MemoryEstimate, host_bytes, memory_estimate
from megasora.config.pack_tokens import largest_clip
from megasora.config.parameters import parameter_count
from megasora.config.pipeline_split import chunk_lengths, stage_parameters
from megasora.config.schema import RunConfig
from megasora.config.validate import problems
from megasora.perf.hardware import load_hardware

if TYPE_CHECKING:
    from megasora.scaling.autoencoder_memory import AutoencoderMemoryEstimate


@dataclass(frozen=True, kw_only=True)
class Args(RecipeArgs):
    """The checks of train, without ranks: every problem at once, each with its cure."""

    gpus: int = 1
    """World size to check for."""
    gpu: str = "h200"
    """Whose memory the run must fit: a profile as megasora plan takes it."""
    json: bool = False
    """Print the problems as JSON."""


@dataclass(frozen=True, kw_only=True)
class OfAutoencoder(AutoencoderArgs):
    """The checks of train-ae, without ranks: every problem at once, each with its cure."""

    gpus: int = 1
    """World size to check for."""
    gpu: str = "h200"
    """Whose memory the run must fit: a profile as megasora plan takes it."""
    json: bool = False
    """Print the problems as JSON."""


OTHERS = (OfAutoencoder,)


def kind_of(words: Sequence[str]) -> type:
    """Of a recipe of a diffusion transformer, or of an autoencoder."""
    return OfAutoencoder if names_autoencoder(words) else Args


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return (autoencoder_defaults if names_autoencoder(words) else config_defaults)(words, command="validate")


def _of_autoencoder(args: OfAutoencoder) -> Answer:
    found, estimate = autoencoder_problems(args.config, world_size=args.gpus), None
    if not found:
        from megasora.scaling.autoencoder_memory import checked_memory

        estimate, found = checked_memory(args.config, world_size=args.gpus, gpu_bytes=load_hardware(args.gpu).memory_bytes)
    if found and not args.json:
        raise UserError("\n  ".join([f"{len(found)} problem(s)", *map(str, found)]))
    memory = None if estimate is None else {"parts": estimate.parts(), "total": estimate.total, "clip": list(estimate.clip)}
    text = [f"{args.config.recipe} on {args.gpus} GPU(s): no problems", *(_memory_lines(estimate) if estimate is not None else ())]
    data = {"problems": [to_dict(problem) for problem in found], "memory": memory}
    return Answer(data=data, show=lines(text), exit_code=2 if found else 0)


def _memory_lines(estimate: AutoencoderMemoryEstimate) -> list[str]:
    frames, height, width = estimate.clip
    parts = [f"  {name:<12} {size / 1e9:>7.2f} GB" for name, size in estimate.parts().items() if size]
    return [f"peak memory of a GPU {estimate.total / 1e9:.1f} GB, with a clip of {frames} x {height} x {width}", *parts]


def run(args: Args | OfAutoencoder) -> Answer:
    """Exit code 2 when there are problems."""
    if args.gpus < 1:
        raise UserError(f"--gpus {args.gpus} must be a positive number")
    if isinstance(args, OfAutoencoder):
        return _of_autoencoder(args)
    found = problems(args.config, world_size=args.gpus, gpu_bytes=load_hardware(args.gpu).memory_bytes)
    if found and not args.json:
        raise UserError("\n  ".join([f"{len(found)} problem(s)", *map(str, found)]))
    estimate = None if found else memory_estimate(args.config, world_size=args.gpus)
    autoencoder = None if found else _autoencoder(args.config)
    data = {
        "problems": [to_dict(problem) for problem in found],
        "memory": None if estimate is None else {**_memory_data(estimate), "host_bytes": _host_bytes(args.config, args.gpus)},
        "autoencoder": autoencoder,
    }
    return Answer(data=data, show=lambda: _show(args.config, args.gpus, estimate, autoencoder), exit_code=2 if found else 0)


def _autoencoder(config: RunConfig) -> dict[str, Any] | None:
    """Bytes and operations of the autoencoder for the run's largest clip, which is encoded in training (beside a cache it is not), and for
    its sample clips.

    None for an autoencoder of no published size without a folder; nothing to encode where clips keep their own size.
    """
    from megasora.models.autoencoders.cost import AutoencoderCost
    from megasora.models.autoencoders.memory import AutoencoderMemory
    from megasora.models.encoders.bundle import counted_autoencoder

    autoencoder = counted_autoencoder(config.encoders)
    if autoencoder is None or autoencoder.facts.latent_channels != config.model.latent_channels:
        return None
    sample, largest, unit = config.sample, largest_clip(config), config.encoders.spatial_compression * config.model.patch_size
    memory, cost = AutoencoderMemory(autoencoder), AutoencoderCost(autoencoder)
    result: dict[str, Any] = {"weights": memory.weights}
    if largest is not None:
        side = int(largest[1] / unit) * unit
        size = {"num_frames": largest[0], "height": side, "width": side}
        result["encode"] = {**_named(size), "bytes": memory.encode(**size), "flops": cost.encode(**size)}
    size = {"num_frames": sample.num_frames, "height": sample.height, "width": sample.width}
    result["decode"] = {**_named(size), "bytes": memory.decode(**size), "flops": cost.decode(**size)}
    return result


def _named(size: Mapping[str, int]) -> dict[str, int]:
    return {"frames": size["num_frames"], "height": size["height"], "width": size["width"]}


def _host_bytes(config: RunConfig, gpus: int) -> int:
    """Page-locked host memory of a rank's offloaded inputs."""
    return round(host_bytes(config, world_size=gpus))


def _memory_data(estimate: MemoryEstimate) -> dict[str, Any]:
    """Bytes on the fullest GPU."""
    place = {"stage": estimate.stage, "tokens": estimate.tokens, "in_flight": estimate.in_flight}
    return {"parts": {name: round(size) for name, size in estimate.parts().items()}, "total": round(estimate.total), **place}


def _show(config: RunConfig, gpus: int, estimate: MemoryEstimate | None, autoencoder: dict[str, Any] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{config.recipe} on {gpus} GPU(s): no problems", show_header=False)
    parallel = config.parallel
    table.add_row("parameters", f"{parameter_count(config.model):,}")
    if parallel.pipeline_model_parallel_size > 1:
        table.add_row("blocks per chunk, in pipeline order", " ".join(map(str, chunk_lengths(config.model, parallel))))
        table.add_row("parameters per stage", " ".join(f"{count / 1e9:.2f} B" for count in stage_parameters(config.model, parallel)))
    table.add_row("data parallel size", str(gpus // parallel.model_parallel_size))
    table.add_row("tokens per step", f"{config.data.global_tokens:,}")
    if estimate is not None:
        passes = f", {estimate.in_flight} forward passes in flight" if estimate.in_flight > 1 else ""
        where = f" (stage {estimate.stage})" if parallel.pipeline_model_parallel_size > 1 else ""
        table.add_section()
        table.add_row(
            f"peak memory of the fullest GPU{where}", f"{estimate.total / 1e9:.1f} GB, {estimate.tokens:,} tokens of a pack{passes}"
        )
        for name, size in estimate.parts().items():
            if size:
                table.add_row(f"  {name.replace('_', ' ').replace('fp8', 'FP8')}", f"{size / 1e9:.1f} GB")
        if host := _host_bytes(config, gpus):
            table.add_row("page-locked host memory of each GPU's rank", f"up to {host / 1e9:.1f} GB of offloaded inputs")
    if autoencoder is not None:
        table.add_section()
        table.add_row("autoencoder beside it: weights", f"{autoencoder['weights'] / 1e9:.1f} GB")
        for what in ("encode", "decode"):
            if what in autoencoder:
                clip = autoencoder[what]
                pixels = f"{clip['frames']} x {clip['height']} x {clip['width']}"
                table.add_row(f"  to {what} {pixels} at most", f"{clip['bytes'] / 1e9:.1f} GB, {clip['flops'] / 1e12:,.0f} TFLOP")
    Console().print(table)

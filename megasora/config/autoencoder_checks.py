"""All problems of a run of `megasora train-ae` at once, each with its cure. Pure arithmetic on the config."""

from __future__ import annotations

from collections.abc import Iterator

from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.distillation_checks import distillation_problems
from megasora.config.errors import UserError
from megasora.config.latent_frames import frame_rule, is_frame_count, nearest_frame_count
from megasora.config.number_checks import check_milestones, optimizer_ranges, outside, run_ranges
from megasora.config.problem import Problem
from megasora.config.profile_steps import profiled_steps
from megasora.config.schema import OptimizerConfig


def autoencoder_problems(config: AutoencoderRunConfig, *, world_size: int) -> list[Problem]:
    """Everything that cannot work.

    Args:
        config: the run.
        world_size: ranks of the job.
    """
    checks = (
        _layout(config, world_size),
        _optimizers(config),
        _network(config),
        _losses(config),
        _adversary(config),
        distillation_problems(config),
        _data(config),
        _numbers(config),
    )
    return [problem for check in checks for problem in check]


def raise_on_autoencoder_problems(config: AutoencoderRunConfig, *, world_size: int) -> None:
    """Refuse a run that cannot work.

    Raises:
        UserError: one line per problem, each with its cure.
    """
    found = autoencoder_problems(config, world_size=world_size)
    if found:
        raise UserError(str(found[0]) if len(found) == 1 else "\n  ".join([f"{len(found)} problems", *map(str, found)]))


def _layout(config: AutoencoderRunConfig, world_size: int) -> Iterator[Problem]:
    cp, axis = config.parallel.context_parallel_size, config.parallel.context_parallel_axis
    if world_size < 1:
        yield Problem(field="world size", message=f"is {world_size}", cure="use at least 1 rank")
    if cp < 1 or world_size % cp:
        yield Problem(
            field="parallel.context_parallel_size",
            message=f"is {cp}, which does not divide {world_size} rank(s)",
            cure=f"use a divisor of {world_size}, or a multiple of {max(cp, 1)} ranks",
        )
    elif world_size // cp > config.data.batch_size >= 1:
        groups = f"groups of {cp} of {world_size} ranks" if cp > 1 else f"{world_size} ranks"
        yield Problem(
            field="data.batch_size",
            message=f"{config.data.batch_size} clips of a step leave some of {groups} without one",
            cure=f"use {world_size // cp} or more, fewer ranks, or a larger --parallel.context_parallel_size",
        )
    if axis == "time" and config.autoencoder.kind == "hunyuan":
        yield Problem(
            field="parallel.context_parallel_axis",
            message="is time: in HunyuanVideo's autoencoder frame 0 stands alone in every layer",
            cure="use height",
        )
    if cp > 1:
        yield from _patches(config)
    if config.device == "cpu" and config.precision.dtype == "bf16":
        yield Problem(
            field="precision.dtype", message="is bf16 on the CPU, which no recipe is tested with", cure="use --precision.dtype fp32"
        )


def _sections(config: AutoencoderRunConfig) -> tuple[tuple[str, OptimizerConfig], ...]:
    """Every optimizer, by its section."""
    return (
        ("optimizer", config.optimizer),
        ("discriminator.optimizer", config.discriminator.optimizer),
        ("distillation.optimizer", config.distillation.optimizer),
    )


def _optimizers(config: AutoencoderRunConfig) -> Iterator[Problem]:
    for section, settings in _sections(config):
        for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
            if getattr(settings, name) != "fp32":
                yield Problem(
                    field=f"{section}.{name}",
                    message=f"is {getattr(settings, name)}: an autoencoder's moments are small and stay fp32",
                    cure="use fp32",
                )


def _patches(config: AutoencoderRunConfig) -> Iterator[Problem]:
    """Slabs of the discriminator are whole patches, which halve the frames twice and rows num_layers times."""
    layers, data = config.discriminator.num_layers, config.data
    if not config.has_discriminator or layers < 1:
        return
    side = data.resolution.removesuffix("px")
    if data.aspect == "square" and side.isdecimal() and int(side) % 2**layers:
        yield Problem(
            field="discriminator.num_layers",
            message=f"ranks share {side} rows in whole patches of {2**layers}",
            cure=f"use --data.resolution {max(1, round(int(side) / 2**layers)) * 2**layers}px, or fewer layers",
        )
    unit = 2 ** min(2, layers)
    bad = [frames for frames in data.frame_counts if frames > 1 and frames % unit]
    if config.parallel.context_parallel_axis == "time" and bad:
        yield Problem(
            field="data.frame_counts",
            message=f"{bad}: ranks share frames in whole patches of {unit}",
            cure=f"use multiples of {unit}, or --parallel.context_parallel_axis height",
        )


def _network(config: AutoencoderRunConfig) -> Iterator[Problem]:
    settings, init = config.autoencoder, config.init
    if settings.kind == "dc-ae":
        yield from (Problem(field="autoencoder.sizes", message=wrong, cure="change the sizes") for wrong in settings.sizes.problems())
        for name in ("temporal_compression", "spatial_compression"):
            wants, has = getattr(settings.sizes, name), getattr(settings, name)
            if wants != has:
                yield Problem(field=f"autoencoder.{name}", message=f"is {has}, of these sizes it is {wants}", cure=f"use {wants}")
    elif init.weights is None:
        yield Problem(
            field="init.weights",
            message="HunyuanVideo's autoencoder is trained on from its folder, which says its sizes",
            cure="add --init.weights FOLDER (diffusers' AutoencoderKLHunyuanVideo)",
        )
    if init.run is not None and init.weights is not None and settings.kind == "dc-ae":
        yield Problem(field="init.run", message="and init.weights are both given", cure="leave one of them out")
    if init.run is None and init.run_weights != "auto":
        yield Problem(field="init.run_weights", message=f"is {init.run_weights} without init.run", cure="add --init.run FOLDER")


def _losses(config: AutoencoderRunConfig) -> Iterator[Problem]:
    loss = config.loss
    for name in ("lpips_weight", "kl_weight"):
        if getattr(loss, name) < 0:
            yield Problem(field=f"loss.{name}", message=f"is {getattr(loss, name)}", cure="use 0 or more")
    if loss.lpips_weight > 0 and loss.lpips is None:
        yield Problem(
            field="loss.lpips",
            message=f"LPIPS has weight {loss.lpips_weight} and no weights of its own",
            cure="add --loss.lpips FOLDER (torchvision's vgg16 and lpips/weights/v0.1/vgg.pth), or --loss.lpips_weight 0",
        )
    if loss.kl_weight > 0 and config.autoencoder.kind == "dc-ae":
        yield Problem(field="loss.kl_weight", message="a DC-AE's posterior has no spread to weigh", cure="use 0")


def _adversary(config: AutoencoderRunConfig) -> Iterator[Problem]:
    settings = config.discriminator
    if settings.weight < 0:
        yield Problem(field="discriminator.weight", message=f"is {settings.weight}", cure="use 0 (none) or 0.05")
    if not config.has_discriminator:
        return
    if settings.width < 1 or settings.num_layers < 1:
        yield Problem(field="discriminator", message="has no layers", cure="use width 64 and num_layers 5")
    if settings.norm == "group" and settings.width * 2 % 32:
        yield Problem(field="discriminator.norm", message=f"{2 * settings.width} channels are no 32 groups", cure="use clip")
    if not 0 <= settings.dropout < 1:
        yield Problem(field="discriminator.dropout", message=f"is {settings.dropout}", cure="use 0 to below 1")
    if settings.start_step < 0:
        yield Problem(field="discriminator.start_step", message=f"is {settings.start_step}", cure="use 0 or more")
    if settings.optimizer.ema_decay != 0:
        yield Problem(field="discriminator.optimizer.ema_decay", message="no moving average is kept of the discriminator", cure="use 0")


def _data(config: AutoencoderRunConfig) -> Iterator[Problem]:
    data, settings = config.data, config.autoencoder
    ratio, causal = settings.temporal_compression, settings.causal
    bad = [n for n in data.frame_counts if not is_frame_count(n, compression=ratio, causal=causal)]
    if bad or not data.frame_counts:
        near = nearest_frame_count(bad[0], compression=ratio, causal=causal) if bad else ratio * 8 + causal
        yield Problem(
            field="data.frame_counts",
            message=f"{bad or 'empty'}: the autoencoder takes {frame_rule(compression=ratio, causal=causal)} frames",
            cure=f"use {near}",
        )
    if data.batch_size < 1:
        yield Problem(field="data.batch_size", message=f"is {data.batch_size}", cure="use at least 1")
    if data.max_frame_interval < 1:
        yield Problem(field="data.max_frame_interval", message=f"is {data.max_frame_interval}", cure="use 1 or more; published: 8")
    if not 0 <= data.image_share <= 1:
        yield Problem(field="data.image_share", message=f"is {data.image_share}", cure="use 0 to 1; published: 0.2")
    if data.aspect == "square" and not data.resolution.endswith("px"):
        yield Problem(
            field="data.aspect", message=f"{data.resolution} has no square", cure="use a class such as 256px, or --data.aspect nearest"
        )
    side = data.resolution.removesuffix("px")
    if data.aspect == "square" and side.isdecimal() and int(side) % settings.spatial_compression:
        unit = settings.spatial_compression
        yield Problem(
            field="data.resolution",
            message=f"{side} pixels are no multiple of the {unit} of a latent pixel",
            cure=f"use {max(1, round(int(side) / unit)) * unit}px",
        )


def _numbers(config: AutoencoderRunConfig) -> Iterator[Problem]:
    yield from outside(run_ranges(config))
    for section, optimizer in _sections(config):
        yield from outside(optimizer_ranges(section, optimizer))
        yield from check_milestones(section, optimizer)
    evaluation = config.evaluation
    if evaluation.interval_steps < 0 or evaluation.max_clips < 1 or evaluation.shown_clips < 0:
        yield Problem(field="evaluation", message="has a negative number", cure="use 0 to turn it off")
    if evaluation.weights == "ema" and config.optimizer.ema_decay == 0:
        yield Problem(field="evaluation.weights", message="is ema, and no average is kept (optimizer.ema_decay 0)", cure="use model")
    try:
        profiled_steps(config.profile.steps)
    except (UserError, ValueError) as error:
        yield Problem(field="profile.steps", message=str(error), cure="use first:last, such as 10:12")

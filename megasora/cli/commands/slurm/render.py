"""`megasora slurm render`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from megasora.cli.endings import Answer, file_errors
from megasora.cli.recipe_arguments import (
    AutoencoderArgs,
    RecipeArgs,
    autoencoder_defaults,
    autoencoder_named,
    config_defaults,
    config_named,
    name_elsewhere,
    names_autoencoder,
)
from megasora.config.autoencoder_checks import raise_on_autoencoder_problems
from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.errors import UserError
from megasora.config.files import written_whole
from megasora.config.schema import RunConfig
from megasora.config.validate import raise_on_problems
from megasora.perf.hardware import load_hardware
from megasora.slurm.flags import changed_flags
from megasora.slurm.job import PREEMPTIBLE_INTERVAL_STEPS, Launcher, SlurmJob, check_job
from megasora.slurm.template import GIVEN, render


@dataclass(frozen=True, kw_only=True)
class JobArgs:
    """What a job asks for, whatever it trains."""

    nodes: int
    """Nodes of the job."""
    gpus_per_node: int = 8
    """Ranks on a node, one a GPU."""
    cpus_per_gpu: int = 12
    """Cores of a rank; data.decode_workers of them decode."""
    gpu: str = "h200"
    """Whose memory the run must fit: a profile as megasora plan takes it."""
    partition: str | None = None
    """Partition; None leaves a line to fill in."""
    account: str | None = None
    """Account; None leaves a line to fill in."""
    time: str = "24:00:00"
    """Time limit of one attempt, as sbatch takes it."""
    warn_s: int = 300
    """Seconds before the limit at which the ranks save and end: a step, and a checkpoint."""
    manifest: str | None = None
    """Clips to train on, as --data.manifest; without it the file asks for MANIFEST at submission. So with the next three."""
    weights: str | None = None
    """What to start from, as --init.weights (WEIGHTS)."""
    run: str | None = None
    """Run of the stage before, as --init.run (RUN)."""
    launcher: Launcher = "srun"
    """srun: a task a rank. torchrun: a task a node, which starts its ranks again when one crashes, without a new place in the queue."""
    preemptible: bool = False
    """For nodes that other jobs may take at any time: a checkpoint every 200 steps or sooner, and restarts without end."""
    max_restarts: int | None = None
    """Restarts of any cause after which a crash is not started again; None: 20, preemptible 1000."""
    options: tuple[str, ...] = ()
    """More options of sbatch without their dashes: qos=high constraint=h100."""
    setup: tuple[str, ...] = ()
    """Shell lines to run before the launch: "module load cuda" "source env/bin/activate"."""
    output: Path | None = None
    """File to write; None prints it."""
    json: bool = False
    """Print the file's name, text and size of the job as JSON."""


@dataclass(frozen=True, kw_only=True)
class Args(RecipeArgs, JobArgs):
    """An sbatch file that trains a recipe to its last step, checked for its number of GPUs; it requeues itself.

    Before the time limit, after preemption, failed nodes and crashes the job goes on from its newest checkpoint; mistakes end it.
    """

    encoders_dir: str | None = None
    """Folder with hunyuan-vae (or dc-ae, for opensora2_dc_ae), t5-v1_1-xxl and clip-vit-large-patch14 (ENCODERS)."""


@dataclass(frozen=True, kw_only=True)
class OfAutoencoder(AutoencoderArgs, JobArgs):
    """An sbatch file that trains an autoencoder's recipe to its last step, checked for its number of GPUs; it requeues itself.

    Before the time limit, after preemption, failed nodes and crashes the job goes on from its newest checkpoint; mistakes end it.
    """

    lpips: str | None = None
    """Weights of LPIPS, as --loss.lpips; without them the file asks for LPIPS at submission."""


AnyArgs: TypeAlias = Args | OfAutoencoder
AnyConfig: TypeAlias = RunConfig | AutoencoderRunConfig
OTHERS = (OfAutoencoder,)


def kind_of(words: Sequence[str]) -> type:
    """Of a recipe of a diffusion transformer, or of an autoencoder."""
    return OfAutoencoder if names_autoencoder(words) else Args


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return (autoencoder_defaults if names_autoencoder(words) else config_defaults)(words, command="slurm render")


def run(args: AnyArgs) -> Answer:
    """The file, or the problems that its job would end with."""
    job = _job(args)
    check_job(job)
    gpu_bytes = load_hardware(args.gpu).memory_bytes
    if isinstance(job.config, AutoencoderRunConfig):
        _check_autoencoder(job.config, job, gpu_bytes=gpu_bytes)
    else:
        raise_on_problems(job.config, world_size=job.world_size, check_memory=job.on_gpus, gpu_bytes=gpu_bytes)
    text = render(job)
    if args.output is not None:
        with file_errors(), written_whole(args.output) as temporary:
            temporary.write_text(text)
    data = {"file": None if args.output is None else str(args.output), "nodes": job.nodes, "gpus": job.world_size, "text": text}
    return Answer(data=data, show=lambda: _show(args, job, text))


def _check_autoencoder(config: AutoencoderRunConfig, job: SlurmJob, *, gpu_bytes: float) -> None:
    """The checks of train-ae, where LPIPS's folder may be given at submission."""
    loss = config.loss
    if loss.lpips is None and loss.lpips_weight > 0:
        config = replace(config, loss=replace(loss, lpips="LPIPS"))
    raise_on_autoencoder_problems(config, world_size=job.world_size)
    if not job.on_gpus:
        return
    from megasora.scaling.autoencoder_memory import checked_memory

    _, found = checked_memory(config, world_size=job.world_size, gpu_bytes=gpu_bytes)
    if found:
        raise UserError(str(found[0]))


def _job(args: AnyArgs) -> SlurmJob:
    base: AnyConfig = autoencoder_named(args.source) if isinstance(args, OfAutoencoder) else config_named(args.source)
    config = _with_sources(args)
    return SlurmJob(
        recipe=name_elsewhere(args.source),
        config=config,
        flags=tuple(changed_flags(base, config, without=GIVEN)),
        command=_command(args, base),
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        cpus_per_gpu=args.cpus_per_gpu,
        partition=args.partition,
        account=args.account,
        time=args.time,
        warn_s=args.warn_s,
        encoders=args.encoders_dir if isinstance(args, Args) else None,
        launcher=args.launcher,
        preemptible=args.preemptible,
        max_restarts=args.max_restarts,
        options=args.options,
        setup=args.setup,
    )


def _command(args: AnyArgs, base: AnyConfig) -> str:
    """The command itself, without where to write."""
    words = ["megasora", "slurm", "render", args.source]
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name in ("source", "config", "output", "json") or value == field.default:
            continue
        words += [f"--{field.name}", *([] if value is True else map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join([*words, *changed_flags(base, args.config)])


def _with_sources(args: AnyArgs) -> AnyConfig:
    """The settings, with what has a flag of its own here.

    Raises:
        UserError: it was given twice.
    """
    config: AnyConfig = args.config
    sources = [
        ("manifest", args.manifest, config.data.manifest, "data.manifest"),
        ("weights", args.weights, config.init.weights, "init.weights"),
        ("run", args.run, config.init.run, "init.run"),
    ]
    if isinstance(args, OfAutoencoder):
        sources.append(("lpips", args.lpips, args.config.loss.lpips, "loss.lpips"))
    for flag, given, known, setting in sources:
        if given is not None and known not in (None, given):
            raise UserError(f"--{flag} {given} and {setting} {known} differ; give one of them")
    checkpoint, most = config.checkpoint, PREEMPTIBLE_INTERVAL_STEPS
    if args.preemptible and (checkpoint.interval_steps == 0 or checkpoint.interval_steps > most):
        checkpoint = replace(checkpoint, interval_steps=most)
    weights, run = args.weights or config.init.weights, args.run or config.init.run
    manifest = args.manifest or config.data.manifest
    if isinstance(args, OfAutoencoder):
        of = args.config
        data, loss = replace(of.data, manifest=manifest), replace(of.loss, lpips=args.lpips or of.loss.lpips)
        return replace(of, data=data, init=replace(of.init, weights=weights, run=run), checkpoint=checkpoint, loss=loss)
    plain = args.config
    return replace(
        plain, data=replace(plain.data, manifest=manifest), init=replace(plain.init, weights=weights, run=run), checkpoint=checkpoint
    )


def _show(args: AnyArgs, job: SlurmJob, text: str) -> None:
    if args.output is None:
        print(text, end="")
    else:
        print(f"{args.output}: {args.source} on {job.nodes} x {job.gpus_per_node} = {job.world_size} ranks; sbatch {args.output}")

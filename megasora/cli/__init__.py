"""The `megasora` command: parse, build, run. tyro lives here only; heavy imports happen inside the command that needs them.

A user's mistake is one line on rank 0 with its cure and exit code 2, never a stack trace.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

from megasora import recipes
from megasora.cli import data
from megasora.cli.parsing import file_errors, leave, parse, partition, paths, rank, run_config, underscored
from megasora.cli.progress import byte_bar
from megasora.config.errors import UserError
from megasora.config.io import dump, to_dict
from megasora.config.parameters import parameter_count
from megasora.config.pipeline_split import chunk_lengths, stage_parameters
from megasora.config.validate import model_state_bytes, problems, raise_on_problems, refuse_missing_autoencoder

Axes = tuple[int, int, int]

LATER = {
    "plan": "the layout planner",
    "dryrun": "the dry run",
    "study": "scaling studies",
}
"""Commands of the contract that this version does not have yet; they refuse, they are not missing."""


@dataclass(frozen=True, kw_only=True)
class ForwardArgs:
    """One forward pass of weights on inputs, in any layout (the parity tool)."""

    weights: Path
    """Weights of any format."""
    inputs: Path
    """in.safetensors: img, img_ids, txt, txt_ids, timesteps, y_vec, guidance and cond where the model has them."""
    output: Path
    """out.safetensors: pred [B, N, C], fp32."""
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vp: int | None = None
    grads: Path | None = None
    """Write the gradient of mean(pred^2) for every parameter under its release key."""
    axes_dim: Axes | None = None
    """Rotary dims per axis; None takes K/8, 7K/16, 7K/16."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    context_parallel_backend: Literal["auto", "ulysses", "ring", "ulysses_ring"] = "auto"


@dataclass(frozen=True, kw_only=True)
class SampleArgs:
    """Where a sampling run reads and writes; sizes are --height, --width, --num_frames, --fps, --steps, --seed."""

    weights: Path
    """Weights of any format, or a training checkpoint."""
    prompt: tuple[str, ...]
    """One or more prompts."""
    output: Path
    """Folder of the clips."""
    image: Path | None = None
    """First frame (i2v_head)."""
    select: Literal["model", "ema"] = "model"
    """Which weights of a training checkpoint."""
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    steps: int | None = None
    seed: int | None = None


WeightFormat = Literal["flux", "diffusers", "opensora", "opensora-fused", "megasora"]
TargetFormat = WeightFormat | Literal["peft", "kohya", "hunyuan-vae", "diffusers-vae"]


@dataclass(frozen=True, kw_only=True)
class ConvertArgs:
    """Weights from one format to another, tensor by tensor; an interrupted conversion goes on where it stopped."""

    source_format: Annotated[WeightFormat | Literal["auto"], tyro.conf.arg(name="from")] = "auto"
    """Format of the source; auto looks at its tensors."""
    target_format: Annotated[TargetFormat, tyro.conf.arg(name="to")]
    """Format of the target; of a LoRA adapter its naming (diffusers, peft, kohya), of an autoencoder hunyuan-vae or diffusers-vae."""
    select: Literal["model", "master", "ema"] = "model"
    """Which weights of a training checkpoint."""
    init: Literal["open-sora-v2"] | None = None
    """Make an initialisation of Open-Sora v2 from FLUX: cond_in is added, all zero, guidance_in is dropped."""
    drop_cond: bool = False
    """Export a model with an image condition to a format without: fold cond_in.bias into img_in.bias, drop cond_in.weight (lossy)."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Type of every floating-point tensor of the target; None keeps each as it is."""
    merge_lora: Path | None = None
    """LoRA adapter (PEFT folder, diffusers or kohya file) to merge into the weights."""
    lora_scale: float = 1.0
    """Factor of what the adapter adds."""
    verify: bool = False
    """Replay the inverse and compare bits afterwards; a target that is already complete is only verified."""
    axes_dim: Axes | None = None
    """Rotary dims per axis; None takes what the file says, or K/8, 7K/16, 7K/16."""
    shard_gb: float = 10.0
    """Most gigabytes (1e9 bytes) of a shard, where the target is a folder."""
    workers: int | None = None
    """Threads; None takes the machine's cores, at most 4."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True, kw_only=True)
class InspectArgs:
    """What a file or folder of weights is."""

    json: bool = False
    """Print JSON."""
    tensors: bool = False
    """List every tensor."""


@dataclass(frozen=True, kw_only=True)
class CompareArgs:
    """Two sets of weights, tensor by tensor; of different formats by canonical names."""

    rtol: float | None = None
    """Count tensors as equal when the largest difference is at most this fraction of B's largest magnitude; None asks for equal bits."""
    select: Literal["model", "master", "ema"] = "model"
    """Which weights of a training checkpoint."""
    json: bool = False
    """Print JSON with every tensor."""
    top: int = 10
    """Tensors to list, the most different first."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exits 0, or 2 after a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")  # `megasora doctor` says so, once
    warnings.filterwarnings(
        "ignore", message="`torch.distributed.*is deprecated", category=FutureWarning
    )  # Megatron's calls, not the user's
    try:
        _dispatch(arguments)
    except UserError as error:
        if rank() == 0:
            print(f"megasora: error: {error}", file=sys.stderr, flush=True)
        leave(2)
    except KeyboardInterrupt:
        leave(130)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    name, rest = arguments[0], arguments[1:]
    if name in LATER:
        raise UserError(f"{name}: {LATER[name]} is not available in this version; see docs/architecture.md for what is")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, *LATER], n=1)
        raise UserError(f"no command {name!r}{f'; did you mean {near[0]}?' if near else '; try megasora --help'}")
    COMMANDS[name](rest)


def _overview() -> str:
    lines = ["usage: megasora COMMAND ...", ""]
    lines += [f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    lines += [f"  {name:<10} (not in this version) {what}" for name, what in LATER.items()]
    return "\n".join([*lines, "", "megasora train RECIPE --help lists every setting of a recipe."])


def _train(arguments: list[str]) -> None:
    """RECIPE [--section.field value ...]: train, or go on with a run."""
    config = run_config(arguments, command="train")
    refuse_missing_autoencoder(config)
    # refused before the slow imports; with device=auto the memory estimate waits until the device is known
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    raise_on_problems(config, world_size=world_size, check_memory=config.device != "auto")
    from megasora.training.run import train

    train(config)


def _validate(arguments: list[str]) -> None:
    """RECIPE --gpus N [...]: the checks of train, without ranks."""
    gpus = 1
    rest: list[str] = []
    as_json = "--json" in arguments
    queue = iter([argument for argument in arguments if argument != "--json"])
    for argument in queue:
        if argument == "--gpus" or argument.startswith("--gpus="):
            value = argument.partition("=")[2] or next(queue, "")
            if not value.isdigit() or int(value) < 1:
                raise UserError(f"--gpus {value!r} must be a positive number")
            gpus = int(value)
        else:
            rest.append(argument)
    config = run_config(rest, command="validate")
    found = problems(config, world_size=gpus)
    if as_json:
        print(json.dumps({"problems": [to_dict(problem) for problem in found]}))
        if found:
            leave(2)
        return
    if found:
        raise UserError("\n  ".join([f"{len(found)} problem(s)", *map(str, found)]))
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


def _only_json(arguments: list[str], *, command: str) -> None:
    """Refuse anything but --json.

    Raises:
        UserError: another argument.
    """
    for argument in arguments:
        if argument != "--json":
            raise UserError(f"{command} takes no argument but --json, got {argument}")


def _recipes(arguments: list[str]) -> None:
    """List the recipes."""
    _only_json(arguments, command="recipes")
    rows = [
        {"name": name, "parameters": parameter_count(recipe().model), "about": (recipe.__doc__ or "").splitlines()[0]}
        for name, recipe in recipes.RECIPES.items()
    ]
    if "--json" in arguments:
        print(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "parameters", "about")
    for row in rows:
        table.add_row(str(row["name"]), f"{row['parameters']:,}", str(row["about"]))
    Console().print(table)


def _show(arguments: list[str]) -> None:
    """RECIPE [...] [--json]: every setting."""
    config = run_config([argument for argument in arguments if argument != "--json"], command="show")
    print(json.dumps(to_dict(config)) if "--json" in arguments else dump(config), end="" if "--json" not in arguments else "\n")


def _forward(arguments: list[str]) -> None:
    """--weights PATH --inputs FILE --output FILE [...]: one forward in any layout (the parity tool)."""
    args = parse(ForwardArgs, [underscored(a) for a in arguments], prog="megasora forward")
    from megasora.inference.forward import run_forward

    run_forward(**{field.name: getattr(args, field.name) for field in fields(args)})


def _sample(arguments: list[str]) -> None:
    """RECIPE --weights PATH --prompt TEXT --output DIR [...]: text (and image) to video."""
    own = {f"--{field.name}" for field in fields(SampleArgs)}
    mine, rest = partition([underscored(a) for a in arguments[1:]], own)
    config = run_config([*arguments[:1], *rest], command="sample")
    args = parse(SampleArgs, mine, prog="megasora sample")
    from megasora.inference.sample import run_sample

    run_sample(config, **{field.name: getattr(args, field.name) for field in fields(args)})


def _convert(arguments: list[str]) -> None:
    """SRC DST --to FORMAT [...]: weights between formats, proved with --verify."""
    source, target = paths(arguments, 2, usage="megasora convert SRC DST --to FORMAT", kind=ConvertArgs)
    args = parse(ConvertArgs, [underscored(a) for a in arguments[2:]], prog="megasora convert")
    from megasora.checkpoint import autoencoder, export

    given: Any
    with byte_bar(target.name) as bar, file_errors(f"{target} is not complete; run the same command again and it goes on"):
        if args.target_format in ("hunyuan-vae", "diffusers-vae"):
            given = autoencoder.export_autoencoder(source, target, target_format=args.target_format)
        elif export.is_adapter(source):
            given = export.export_adapter(source, target, naming=args.target_format)
        else:
            given = export.export_weights(
                source,
                target,
                source_format=args.source_format,
                target_format=cast(WeightFormat, args.target_format),
                select=args.select,
                init=args.init,
                drop_cond=args.drop_cond,
                dtype=args.dtype,
                merge_lora=args.merge_lora,
                lora_scale=args.lora_scale,
                axes_dim=args.axes_dim,
                workers=args.workers,
                shard_bytes=int(args.shard_gb * 1e9),
                prove=args.verify,
                on_start=bar.start,
                on_progress=bar.advance,
            )
    if args.json:
        proof = None if given.proof is None else to_dict(given.proof)
        print(json.dumps({"source": str(source), "target": str(target), "lines": list(given.lines), "proof": proof}))
    else:
        print("\n".join(given.lines))


def _inspect(arguments: list[str]) -> None:
    """PATH [--tensors] [--json]: what a file or folder of weights is."""
    (path,) = paths(arguments, 1, usage="megasora inspect PATH", kind=InspectArgs)
    args = parse(InspectArgs, [underscored(a) for a in arguments[1:]], prog="megasora inspect")
    from megasora.checkpoint.inspect import describe, render

    with file_errors():
        facts = describe(path, tensors=args.tensors)
    print(json.dumps(facts)) if args.json else render(facts)


def _compare(arguments: list[str]) -> None:
    """A B [--rtol R] [--json]: two sets of weights; exit code 0 equal, 1 different."""
    a, b = paths(arguments, 2, usage="megasora compare A B", kind=CompareArgs)
    args = parse(CompareArgs, [underscored(word) for word in arguments[2:]], prog="megasora compare")
    from megasora.checkpoint.compare import compare, render

    with file_errors():
        result = compare(a, b, rtol=args.rtol, select=args.select)
    print(json.dumps(result.as_dict())) if args.json else render(result, top=args.top)
    if not result.equal:
        leave(1)


def _doctor(arguments: list[str]) -> None:
    """What is installed, and what each missing part would bring."""
    _only_json(arguments, command="doctor")
    rows = [*_packages(), _cuda()]
    if "--json" in arguments:
        print(json.dumps(rows))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("part", "state", "brings")
    for row in rows:
        table.add_row(*(escape(row[column]) for column in ("part", "state", "brings")))
    Console().print(table)


def _packages() -> list[dict[str, str]]:
    from importlib.metadata import PackageNotFoundError, version

    parts = (
        ("torch", "tensors", "pip install torch"),
        ("megatron-core", "tensor, pipeline and data parallelism", "pip install megatron-core==0.16.1"),
        ("transformer-engine", "FP8 and fused layers on CUDA", 'pip install "megasora[gpu]"'),
        ("flash-attn", "variable-length attention on CUDA", 'pip install "megasora[flash]"'),
        ("nvidia-dali-cuda130", "video decoding on the GPU", 'pip install "megasora[data]"'),
        ("av", "video decoding on the CPU, mp4 output", "pip install av"),
        ("duckdb", "data filter and report, tables of clips", 'pip install "megasora[data]"'),
        ("pebble", "killable workers of data probe, shots and score", 'pip install "megasora[data]"'),
        ("scenedetect-headless", "scene cuts", 'pip install "megasora[data]"'),
        ("opencv-python-headless", "blur and light scores", 'pip install "megasora[data]"'),
        ("rapidocr", "text in clips", 'pip install "megasora[data]"'),
        ("pdqhash", "hashes of frames", 'pip install "megasora[data]"'),
        ("faiss-cpu", "near-duplicates", 'pip install "megasora[data]"'),
        ("ray", "data probe, shots and score on a cluster", 'pip install "megasora[ray]"'),
        ("diffusers", "the HunyuanVideo autoencoder", "pip install diffusers"),
        ("transformers", "T5 and CLIP", "pip install transformers"),
        ("tensorboard", "curves", "pip install tensorboard"),
    )
    rows = []
    for name, brings, cure in parts:
        try:
            rows.append({"part": name, "state": version(name), "brings": brings})
        except PackageNotFoundError:
            rows.append({"part": name, "state": f"missing: {cure}", "brings": brings})
    return rows


def _cuda() -> dict[str, str]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {"part": "CUDA devices", "state": ", ".join(names) or "none: the CPU backend runs", "brings": "speed, FP8, NVDEC"}


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "train": _train,
    "validate": _validate,
    "recipes": _recipes,
    "show": _show,
    "forward": _forward,
    "sample": _sample,
    "convert": _convert,
    "inspect": _inspect,
    "compare": _compare,
    "data": data.run,
    "doctor": _doctor,
}

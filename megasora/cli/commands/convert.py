"""`megasora convert`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

from megasora.cli.endings import Answer, file_errors, lines
from megasora.cli.progress import ByteBar, byte_bar
from megasora.config.errors import UserError
from megasora.config.io import to_dict

WeightFormat = Literal["flux", "diffusers", "opensora", "opensora-fused", "megasora"]
TargetFormat = WeightFormat | Literal["peft", "kohya", "hunyuan-vae", "diffusers-vae", "hcae", "dc-ae", "diffusers-dc-ae"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Weights from one format to another, tensor by tensor; an interrupted conversion goes on where it stopped."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Weights of any format: a file, a folder or a training checkpoint."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Where they go: one file when it ends in .safetensors, a folder otherwise."""
    source_format: Annotated[WeightFormat | Literal["auto"], tyro.conf.arg(name="from")] = "auto"
    """Format of the source; auto looks at its tensors."""
    target_format: Annotated[TargetFormat, tyro.conf.arg(name="to")]
    """Format of the target; of a LoRA adapter its naming (diffusers, peft, kohya), of HunyuanVideo's autoencoder
    hunyuan-vae or diffusers-vae; of the video DC-AE hcae (the published file), dc-ae (our folder) or diffusers-dc-ae (its network of
    pictures, of which dc-ae is made as well)."""
    select: Literal["model", "master", "ema"] = "model"
    """Which weights of a training checkpoint."""
    init: Literal["open-sora-v2"] | None = None
    """Make an initialisation of Open-Sora v2 from FLUX: cond_in is added, all zero, guidance_in is dropped."""
    drop_cond: bool = False
    """Export a model with an image condition to a format without: fold cond_in.bias into img_in.bias, drop cond_in.weight (lossy)."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Type of every floating-point tensor of the target; None keeps each as it is."""
    latent_channels: int | None = None
    """Channels of a video DC-AE's latent that is made of one of pictures; the two layers there start anew. None keeps the source's."""
    merge_lora: Path | None = None
    """LoRA adapter (PEFT folder, diffusers or kohya file) to merge into the weights."""
    lora_scale: float = 1.0
    """Factor of what the adapter adds."""
    verify: bool = False
    """Replay the inverse and compare bits afterwards; a target that is already complete is only verified."""
    axes_dim: tuple[int, int, int] | None = None
    """Rotary dims per axis; None takes what the file says, or K/8, 7K/16, 7K/16."""
    shard_gb: float = 10.0
    """Most gigabytes (1e9 bytes) of a shard, where the target is a folder."""
    workers: int | None = None
    """Threads; None takes the machine's cores, at most 4."""
    json: bool = False
    """Print the result as JSON."""


def run(args: Args) -> Answer:
    """Convert, and prove it with --verify."""
    with (
        byte_bar(args.target.name) as bar,
        file_errors(f"{args.target} is not complete; run the same command again and it goes on"),
    ):
        given = _converted(args, bar)
    proof = None if given.proof is None else to_dict(given.proof)
    return Answer(
        data={"source": str(args.source), "target": str(args.target), "lines": list(given.lines), "proof": proof}, show=lines(given.lines)
    )


def _converted(args: Args, bar: ByteBar) -> Any:
    from megasora.checkpoint import autoencoder, autoencoder_export, export

    if args.target_format in autoencoder_export.FORMATS:
        _refuse_flags_of_models(args)
        return autoencoder_export.export_autoencoder(
            autoencoder.open_autoencoder(args.source, select=args.select),
            args.target,
            target_format=args.target_format,
            dtype=args.dtype,
            latent_channels=args.latent_channels,
            prove=args.verify,
        )
    if args.latent_channels is not None:
        raise UserError(f"--latent_channels is for --to dc-ae, not for {args.target_format}")
    if args.lora_scale != 1.0 and args.merge_lora is None:
        raise UserError(f"--lora_scale {args.lora_scale} is of the adapter of --merge_lora, which is not given")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers} must be at least 1")
    if export.is_adapter(args.source):
        _refuse_flags_of_weights(args)
        return export.export_adapter(args.source, args.target, naming=args.target_format)
    return export.export_weights(
        args.source,
        args.target,
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


def _refuse_flags_of_weights(args: Args) -> None:
    """Refuse what an adapter's new names have no use for.

    Raises:
        UserError: names the flag.
    """
    of_weights = {"from": args.source_format != "auto", "select": args.select != "model"}
    useless = {**of_weights, **_of_models(args), "dtype": args.dtype is not None, "verify": args.verify}
    if flag := _first_given(useless):
        raise UserError(f"{args.source} is a LoRA adapter, which gets other names and nothing else: leave --{flag} out")


def _refuse_flags_of_models(args: Args) -> None:
    """Refuse what an autoencoder's conversion has no use for.

    Raises:
        UserError: names the flag.
    """
    if flag := _first_given(_of_models(args)):
        raise UserError(f"--{flag} is not for autoencoders: leave it out with --to {args.target_format}")


def _of_models(args: Args) -> dict[str, bool]:
    """Flags for an MMDiT's weights alone -> whether they are given."""
    return {
        "init": args.init is not None,
        "drop_cond": args.drop_cond,
        "merge_lora": args.merge_lora is not None,
        "axes_dim": args.axes_dim is not None,
    }


def _first_given(flags: Mapping[str, bool]) -> str | None:
    return next((name for name, is_given in flags.items() if is_given), None)

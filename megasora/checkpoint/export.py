"""From a path to a path: opens the source, plans, converts and proves. What `megasora convert` and the demo call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from megasora.checkpoint.conversion_plan import Dtype, Init, Plan, plan_conversion
from megasora.checkpoint.convert import SHARD_BYTES, OnProgress, convert
from megasora.checkpoint.formats.lora import (
    FORMAT_OF,
    PREFIXES,
    Adapter,
    Naming,
    adapter_tensors,
    convert_adapter,
    looks_like_adapter,
    parse_adapter,
)
from megasora.checkpoint.formats.lora_settings import LoraSettings, parse_settings
from megasora.checkpoint.formats.rules import FORMATS, Format
from megasora.checkpoint.megatron_io import HOLDS, is_megatron_checkpoint
from megasora.checkpoint.outputs import write_json
from megasora.checkpoint.safetensors_io import SafetensorsReader, write_safetensors
from megasora.checkpoint.source import Axes, Select, open_source
from megasora.checkpoint.verify import Proof, verify
from megasora.config.errors import UserError
from megasora.config.files import refuse_existing, written_whole
from megasora.config.schema import ModelConfig

OnStart = Callable[[int, int], None]
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model"
"""How PEFT names a configuration and the weights beside it (peft src/peft/utils/constants.py, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)."""
DIFFUSERS_CONFIG = "lora_adapter_metadata"
"""diffusers loaders/lora_base.py, LORA_ADAPTER_METADATA_KEY."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done."""

    lines: tuple[str, ...]
    """For people: formats, lossy steps, counts, the proof."""
    manifest: dict[str, Any]
    proof: Proof | None


def _refuse_unreadable(plan: Plan, target_format: Format) -> None:
    """Refuse types that a distributed checkpoint cannot hold.

    Raises:
        UserError: names the first tensor.
    """
    wrong = [key for key, item in plan.targets.items() if item.info.dtype not in HOLDS]
    if target_format == "megasora" and wrong:
        raise UserError(f"{wrong[0]} is of type {plan.targets[wrong[0]].info.dtype}, which a checkpoint cannot hold; add --dtype bf16")


def export_weights(
    source_path: Path,
    target: Path,
    *,
    target_format: Format,
    source_format: Format | Literal["auto"] = "auto",
    select: Select = "model",
    init: Init | None = None,
    drop_cond: bool = False,
    dtype: Dtype | None = None,
    merge_lora: Path | None = None,
    lora_scale: float = 1.0,
    axes_dim: Axes | None = None,
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    prove: bool = False,
    on_start: OnStart | None = None,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Convert weights; the target appears only when complete.

    Args:
        source_path, source_format, select, axes_dim: see `open_source`.
        target, workers, shard_bytes, on_start, on_progress: see `convert`.
        target_format, init, drop_cond, dtype, lora_scale: see `plan_conversion`.
        merge_lora: adapter to merge into the weights.
        prove: verify after converting; a target that is already complete is only verified.

    Raises:
        UserError: see `open_source`, `plan_conversion`, `convert`, `verify`.
    """
    if target_format not in FORMATS:
        raise UserError(f"--to {target_format} is not for an MMDiT's weights; use one of {', '.join(FORMATS)}")
    options = {
        "select": select,
        "init": init,
        "drop_cond": drop_cond,
        "dtype": dtype,
        "merge_lora": None if merge_lora is None else merge_lora.name,
        "lora_scale": lora_scale if merge_lora is not None else None,
    }
    if prove and target.exists() and not source_path.exists():
        gone = verify(target, plan=None, options=options)
        return Conversion(lines=(f"{target} against its manifest; {source_path} is gone", *_proved(gone)), manifest={}, proof=gone)
    source = open_source(source_path, fmt=source_format, axes_dim=axes_dim, select=select)
    adapter = None if merge_lora is None else open_adapter(merge_lora, model=source.model)
    plan = plan_conversion(source, target_format, init=init, drop_cond=drop_cond, dtype=dtype, adapter=adapter, lora_scale=lora_scale)
    _refuse_unreadable(plan, target_format)
    lines = [f"{source.fmt} -> {target_format}: {source_path} -> {target}", *plan.notes]
    manifest: dict[str, Any] = {}
    if not (prove and target.exists()):
        manifest = convert(
            plan, target, options=options, workers=workers, shard_bytes=shard_bytes, on_start=on_start, on_progress=on_progress
        )
        parameters = sum(item.info.numel for item in plan.targets.values())
        lines.append(f"{len(plan.targets)} tensors, {parameters:,} parameters, {plan.num_bytes:,} bytes")
    proof = verify(target, plan=plan, options=options) if prove else None
    return Conversion(lines=(*lines, *(_proved(proof) if proof else ())), manifest=manifest, proof=proof)


def _proved(proof: Proof) -> Iterator[str]:
    yield f"verified: {proof.target_hashes} target tensors have the hashes of the manifest"
    yield f"verified: {proof.inverted} source tensors come back bit for bit"
    if proof.replayed:
        yield f"verified: {proof.replayed} edited or cast tensors were made again from the source, bit for bit"
    if proof.unproved:
        yield f"not verified: {len(proof.unproved)} edited or cast tensors need the source"


def is_adapter(path: Path) -> bool:
    """Whether a path holds a LoRA adapter."""
    if not path.exists() or is_megatron_checkpoint(path) or (path / "transformer" / "config.json").is_file():
        return False
    return looks_like_adapter(SafetensorsReader(path).infos)


def open_adapter(path: Path, *, model: ModelConfig | None) -> Adapter:
    """Read a LoRA file or a PEFT folder.

    Raises:
        UserError: it is none.
    """
    reader = SafetensorsReader(path)
    if not looks_like_adapter(reader.infos):
        raise UserError(f"{path} is no LoRA adapter: no tensor is named lora_A, lora_B, lora_down or lora_up")
    return parse_adapter({key: reader.read(key) for key in reader.keys()}, settings=_adapter_settings(path, reader), model=model)


def _adapter_settings(path: Path, reader: SafetensorsReader) -> LoraSettings | None:
    """Ranks and alphas of an adapter: PEFT's adapter_config.json beside it, or the table that diffusers writes into the header.

    Raises:
        UserError: a PEFT adapter without its configuration, a damaged one, two that disagree, or more than plain LoRA.
    """
    header = _header_settings(path, reader.metadata.get(DIFFUSERS_CONFIG))
    file = (path if path.is_dir() else path.parent) / PEFT_CONFIG
    by_peft = all(part.path.name.startswith(PEFT_WEIGHTS) for part in reader.files)
    if file.is_file() and (by_peft or any(key.startswith(PREFIXES["peft"]) for key in reader.infos)):
        beside = parse_settings(_read_json(file), where=str(file))
    elif header is None and any(key.startswith(PREFIXES["peft"]) for key in reader.infos):
        raise UserError(f"a PEFT adapter keeps its alpha in {file}, which is missing")
    else:
        return header
    if header is not None and header != beside:
        raise UserError(f"{path} and {file} disagree about ranks or alphas; remove the one that is of another adapter")
    return beside


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def _header_settings(path: Path, text: str | None) -> LoraSettings | None:
    """The configuration in a file's header; its names start with `transformer.` where a pipeline wrote it."""
    if text is None:
        return None
    where = f"{path}: {DIFFUSERS_CONFIG}"
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({error})") from error
    if isinstance(table, dict):
        own = {name.removeprefix(PREFIXES["diffusers"]): value for name, value in table.items() if name.startswith(PREFIXES["diffusers"])}
        table = own or table
    return parse_settings(table, where=where)


def export_adapter(source: Path, target: Path, *, naming: str) -> Conversion:
    """Convert a LoRA adapter to another naming; PEFT's is a folder, the others are one file.

    Raises:
        UserError: the source is no plain LoRA, or the target exists or has the wrong ending.
    """
    if naming not in PREFIXES:
        raise UserError(f"{source} is a LoRA adapter: --to {naming} is no naming of adapters, use one of {', '.join(PREFIXES)}")
    naming = cast(Naming, naming)
    refuse_existing(target, cure="remove it or choose another name")
    if (target.suffix == ".safetensors") != (naming != "peft"):
        wanted = "is a folder; leave out .safetensors" if naming == "peft" else "is one file; end it in .safetensors"
        raise UserError(f"{target}: a {naming} adapter {wanted}")
    adapter = open_adapter(source, model=None)
    modules = convert_adapter(adapter, FORMAT_OF[naming])
    tensors = adapter_tensors(modules, naming)
    metadata = {"format": "pt"}
    if naming == "peft":
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as folder:
            folder.mkdir()
            write_safetensors(folder / "adapter_model.safetensors", tensors, metadata=metadata)
            write_json(folder / PEFT_CONFIG, _peft_config({name: (pair.a.shape[0], pair.alpha) for name, pair in modules.items()}))
    else:
        write_safetensors(target, tensors, metadata=metadata)
    lines = (f"{adapter.naming} ({adapter.fmt} modules) -> {naming} ({FORMAT_OF[naming]} modules): {source} -> {target}",
             f"{len(adapter.modules)} modules became {len(modules)}")  # fmt: skip
    return Conversion(lines=lines, manifest={}, proof=None)


def _peft_config(modules: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """adapter_config.json; ranks and alphas that differ from the first module's stand by whole module name (`^`: to PEFT a bare `proj_out`
    would be that of every block too)."""
    rank, alpha = next(iter(modules.values()))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "rank_pattern": {f"^{name}": own for name, (own, _) in modules.items() if own != rank},
        "alpha_pattern": {f"^{name}": own for name, (_, own) in modules.items() if own != alpha},
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
    }

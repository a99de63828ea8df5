"""The plan of a conversion: what every target tensor is made of, what is left out and why. Pure but for the few tensors it must look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from megasora.checkpoint.formats.canonical import canonical_shapes
from megasora.checkpoint.formats.mapping import Segment, common_dtype, compose, rule_table, stack
from megasora.checkpoint.formats.rules import Format, Rule, canonical_shapes_cached, to_foreign_order
from megasora.checkpoint.source import WeightSource
from megasora.checkpoint.tensors import FLOATS, ITEM_BYTES, Rows, TensorInfo, cast, from_torch
from megasora.config.errors import UserError
from megasora.config.schema import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from megasora.checkpoint.formats.lora import Adapter

Init = Literal["open-sora-v2"]
Dtype = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[Dtype, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
WITHOUT_COND: tuple[Format, ...] = ("flux", "diffusers")
"""Formats whose model has no image condition."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A canonical tensor that is not the source's own."""

    about: str
    info: TensorInfo
    reads: tuple[str, ...]
    """Source tensors it is made of."""
    make: Callable[[], Rows]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One tensor of the target."""

    key: str
    info: TensorInfo
    segments: tuple[Segment, ...]
    """Rows of the source; empty for an edited tensor."""
    rule: Rule | None = None
    """How an edited tensor is stacked from canonical ones."""
    edits: tuple[str, ...] = ()
    """What was done to it besides moving rows."""
    reads: tuple[str, ...] = ()
    """Source tensors it is made of."""

    def describe(self) -> str:
        """The rows it is made of in words, for the manifest."""
        return " + ".join(map(str, self.segments)) or " + ".join(self.reads) or "nothing"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about a conversion before a byte is moved."""

    source: WeightSource
    target_format: Format
    model: ModelConfig
    """Of the target."""
    targets: dict[str, Target]
    dropped: dict[str, str]
    """Source tensors the target does not have, with the reason."""
    notes: list[str]
    edits: dict[str, Edit] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of the target's tensors."""
        return sum(target.info.num_bytes for target in self.targets.values())

    def rows(self, target: Target) -> Rows:
        """The bytes of a target tensor."""
        reader, head_dim = self.source.reader, self.model.head_dim
        parts: list[tuple[Rows, str]] = []
        for segment in target.segments:
            parts.append((segment.read(reader.rows(segment.key), head_dim=head_dim), reader.infos[segment.key].dtype))
        for part in target.rule.parts if target.rule else ():
            edit = self.edits.get(part.key)
            whole = edit.make() if edit else self.source.canonical.rows(part.key)
            own = edit.info if edit else self.source.canonical.infos[part.key]
            rows = to_foreign_order(whole[part.start : part.start + part.rows], order=part.order, head_dim=head_dim)
            parts.append((rows, own.dtype))
        return stack([self._typed(rows, dtype, target.info) for rows, dtype in parts])

    @staticmethod
    def _typed(rows: Rows, dtype: str, info: TensorInfo) -> Rows:
        if dtype == info.dtype:
            return rows
        return cast(rows, TensorInfo(dtype=dtype, shape=(len(rows), *info.shape[1:])), info.dtype)


def plan_conversion(
    source: WeightSource,
    target_format: Format,
    *,
    init: Init | None = None,
    drop_cond: bool = False,
    dtype: Dtype | None = None,
    adapter: Adapter | None = None,
    lora_scale: float = 1.0,
) -> Plan:
    """Decide what the target is made of.

    Args:
        source: opened weights.
        target_format: the format to write.
        init: open-sora-v2 makes an initialisation of Open-Sora v2: zero cond_in added, guidance_in left out.
        drop_cond: for formats without an image condition: fold cond_in.bias into img_in.bias and leave cond_in out, though it is not zero.
        dtype: type of every floating-point tensor; None keeps each as it is.
        adapter: LoRA to merge into the weights.
        lora_scale: factor of what it adds.

    Raises:
        UserError: the target cannot hold what the source has, or a flag has nothing to do.
    """
    notes: list[str] = []
    edits: dict[str, Edit] = {}
    model, dropped_canonical = source.model, dict[str, str]()
    if init == "open-sora-v2":
        model = _initialise(source, target_format, edits, dropped_canonical, notes)
    if model.cond_embed and target_format in WITHOUT_COND:
        model = _leave_cond(source, model, target_format, edits, dropped_canonical, notes, drop_cond=drop_cond)
    elif drop_cond:
        raise UserError(
            f"--drop_cond has nothing to drop: {'the source has no cond_in' if not model.cond_embed else 'the target has cond_in'}"
        )
    if adapter is not None:
        _merge(source, adapter, lora_scale, edits, dropped_canonical, notes)
    if target_format == "diffusers" and (model.time_dim != 256 or model.ffn_hidden_size != 4 * model.hidden_size):
        notes.append(
            f"diffusers' FluxTransformer2DModel is fixed to time_dim 256 and FFN 4 x hidden; with {model.time_dim} and "
            f"{model.ffn_hidden_size} its class will not load this"
        )
    targets = _targets(source, target_format, model, edits, dtype)
    dropped = _dropped(source, dropped_canonical)
    _check_used(source, targets, dropped)
    if dtype is not None:
        changed = [target for target in targets.values() if any(edit.startswith("cast ") for edit in target.edits)]
        if changed:
            notes.append(f"{len(changed)} tensors are cast to {dtype}{_rounding(changed, dtype)}")
    return Plan(source=source, target_format=target_format, model=model, targets=targets, dropped=dropped, notes=notes, edits=edits)


def _rounding(changed: list[Target], dtype: Dtype) -> str:
    lossy = any("lossy" in edit for target in changed for edit in target.edits)
    return f" (lossy: {dtype} holds fewer digits)" if lossy else " (exact)"


def _initialise(
    source: WeightSource, target_format: Format, edits: dict[str, Edit], dropped: dict[str, str], notes: list[str]
) -> ModelConfig:
    if target_format in WITHOUT_COND:
        raise UserError(f"--init open-sora-v2 adds an image condition, which {target_format} cannot hold; use --to opensora or megasora")
    model = source.model
    dtype = source.canonical.infos["img_in.weight"].dtype
    if not model.cond_embed:
        model = replace(model, cond_embed=True)
        shapes = canonical_shapes(model)
        for key in ("cond_in.weight", "cond_in.bias"):
            info = TensorInfo(dtype=dtype, shape=shapes[key])
            edits[key] = Edit(about="zeros (--init open-sora-v2)", info=info, reads=(), make=_zeros(info))
        notes.append("cond_in is added, all zero (--init open-sora-v2)")
    if model.guidance_embed:
        model = replace(model, guidance_embed=False)
        dropped["guidance_in."] = "--init open-sora-v2: Open-Sora v2 has no distilled guidance"
        notes.append("lossy: guidance_in is dropped (--init open-sora-v2)")
    return model


def _zeros(info: TensorInfo) -> Callable[[], Rows]:
    return lambda: np.zeros((info.num_rows, info.row_bytes), dtype=np.uint8)


def _leave_cond(
    source: WeightSource,
    model: ModelConfig,
    target_format: Format,
    edits: dict[str, Edit],
    dropped: dict[str, str],
    notes: list[str],
    *,
    drop_cond: bool,
) -> ModelConfig:
    weight, bias = source.read("cond_in.weight"), source.read("cond_in.bias")
    if bool(weight.any()) or bool(bias.any()):
        if not drop_cond:
            raise UserError(
                f"{target_format} has no cond_in, and this model's is not zero; add --drop_cond to fold its bias and drop its weight"
            )
        info = source.canonical.infos["img_in.bias"]
        edits["img_in.bias"] = Edit(
            about="cond_in.bias added (lossy, --drop_cond)",
            info=info,
            reads=tuple(segment.key for key in ("img_in.bias", "cond_in.bias") for segment in source.canonical.segments[key]),
            make=lambda: from_torch(_sum(source.read("img_in.bias"), bias))[0],
        )
        notes += ["lossy: cond_in.weight is dropped", "lossy: cond_in.bias is folded into img_in.bias"]
    else:
        notes.append("cond_in is left out: it is all zero")
    dropped["cond_in."] = f"{target_format} has no image condition"
    return replace(model, cond_embed=False)


def _sum(tensor: Tensor, addend: Tensor) -> Tensor:
    return (tensor.float() + addend.float()).to(tensor.dtype)


def _merge(source: WeightSource, adapter: Adapter, scale: float, edits: dict[str, Edit], dropped: dict[str, str], notes: list[str]) -> None:
    from megasora.checkpoint.formats.lora import LowRank, canonical_updates

    def merged(key: str, pair: LowRank) -> Callable[[], Rows]:
        def make() -> Rows:
            weight = source.read(key)
            update = (scale * pair.scale) * (pair.b.float() @ pair.a.float())
            return from_torch(_sum(weight, update))[0]

        return make

    updates = canonical_updates(adapter)
    for key, pair in updates.items():
        if any(key.startswith(prefix) for prefix in dropped) or key in edits:
            raise UserError(f"the adapter changes {key}, which this conversion drops or replaces")
        reads = tuple(segment.key for segment in source.canonical.segments[key])
        about = f"LoRA of rank {pair.a.shape[0]} added, scale {scale * pair.scale:g}"
        edits[key] = Edit(about=about, info=source.canonical.infos[key], reads=reads, make=merged(key, pair))
    notes.append(f"lossy: a LoRA is merged into {len(updates)} weights, scale {scale:g}")


def _targets(
    source: WeightSource, target_format: Format, model: ModelConfig, edits: Mapping[str, Edit], dtype: Dtype | None
) -> dict[str, Target]:
    infos, canonical = source.reader.infos, source.canonical
    composed = compose(source.fmt, target_format, _covering(source.model, model))
    targets: dict[str, Target] = {}
    for key, rule in rule_table(target_format, model).items():
        shape = _shape_of(rule, model)
        touched = [part.key for part in rule.parts if part.key in edits]
        if not touched:
            segments = composed[key]
            own = {infos[segment.key].dtype for segment in segments}
            found = own.pop() if len(own) == 1 else _common(key, segments, infos, dtype)
            reads = tuple(dict.fromkeys(segment.key for segment in segments))
            targets[key] = _typed(Target(key=key, info=TensorInfo(dtype=found, shape=shape), segments=segments, reads=reads), dtype)
            continue
        types = {edits[part.key].info.dtype if part.key in edits else canonical.infos[part.key].dtype for part in rule.parts}
        if len(types) > 1 and dtype is None:
            raise UserError(f"{key} would be made of different types ({', '.join(sorted(types))}); add --dtype bf16 or fp32")
        reads = tuple(
            dict.fromkeys(
                name
                for part in rule.parts
                for name in (edits[part.key].reads if part.key in edits else [segment.key for segment in canonical.segments[part.key]])
            )
        )
        abouts = tuple(f"{part}: {edits[part].about}" for part in touched)
        info = TensorInfo(dtype=sorted(types)[0], shape=shape)
        targets[key] = _typed(Target(key=key, info=info, segments=(), rule=rule, edits=abouts, reads=reads), dtype)
    return targets


def _covering(one: ModelConfig, other: ModelConfig) -> ModelConfig:
    """The model with the embedders of both: a table that holds each one's tensors."""
    return replace(one, cond_embed=one.cond_embed or other.cond_embed, guidance_embed=one.guidance_embed or other.guidance_embed)


def _common(key: str, segments: tuple[Segment, ...], infos: Mapping[str, TensorInfo], dtype: Dtype | None) -> str:
    return "mixed" if dtype is not None else common_dtype(key, segments, infos)


def _shape_of(rule: Rule, model: ModelConfig) -> tuple[int, ...]:
    """Shape of the tensor a rule makes."""
    shapes = canonical_shapes_cached(model)
    return (sum(part.rows for part in rule.parts), *shapes[rule.parts[0].key][1:])


def _typed(target: Target, dtype: Dtype | None) -> Target:
    if dtype is None or target.info.dtype == DTYPES[dtype] or (target.info.dtype not in FLOATS and target.info.dtype != "mixed"):
        return target
    wanted = DTYPES[dtype]
    was = target.info.dtype
    exact = was in FLOATS and ITEM_BYTES[was] < ITEM_BYTES[wanted]
    edits = (*target.edits, f"cast {was} to {wanted}{'' if exact else ' (lossy)'}")
    return replace(target, info=replace(target.info, dtype=wanted), edits=edits)


def _dropped(source: WeightSource, canonical: Mapping[str, str]) -> dict[str, str]:
    return {
        segment.key: reason
        for prefix, reason in canonical.items()
        for key, segments in source.canonical.segments.items()
        if key.startswith(prefix)
        for segment in segments
    }


def _check_used(source: WeightSource, targets: Mapping[str, Target], dropped: Mapping[str, str]) -> None:
    """Every source tensor goes somewhere, with every row.

    Raises:
        UserError: names the tensors that do not.
    """
    rows = dict.fromkeys(source.reader.infos, 0)
    for target in targets.values():
        for segment in target.segments:
            rows[segment.key] += segment.rows
        for key in () if target.segments else target.reads:
            rows[key] = max(rows[key], source.reader.infos[key].num_rows)
    lost = sorted(key for key, count in rows.items() if key not in dropped and count < source.reader.infos[key].num_rows)
    if lost:
        raise UserError(f"{len(lost)} source tensors would be lost ({', '.join(lost[:3])})")

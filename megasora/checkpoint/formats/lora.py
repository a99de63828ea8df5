"""LoRA adapters: PEFT, diffusers and kohya names, over any weight format, converted and merged.

An adapter adds (alpha / r) B A to a weight. kohya's trainer adapts FLUX's fused matrices (BFL names, sd-scripts networks/lora_flux.py),
diffusers and PEFT the split ones, so a change of naming is also a change of format: rows of B follow the rows of the weight. Splitting a
fused pair keeps A; fusing pairs with different A stacks them (rank adds up), with equal A undoes the split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from typing import Literal

import torch
from torch import Tensor

from megasora.checkpoint.formats.lora_settings import LoraSettings
from megasora.checkpoint.formats.mapping import Segment, compose, shapes_in
from megasora.checkpoint.formats.rules import Format, to_canonical_order, to_foreign_order
from megasora.config.errors import UserError
from megasora.config.schema import ModelConfig

Naming = Literal["peft", "diffusers", "kohya"]
PREFIXES: dict[Naming, str] = {"peft": "base_model.model.", "diffusers": "transformer.", "kohya": "lora_unet_"}
ENDS: dict[Naming, tuple[str, str]] = {
    "peft": ("lora_A.weight", "lora_B.weight"),
    "diffusers": ("lora_A.weight", "lora_B.weight"),
    "kohya": ("lora_down.weight", "lora_up.weight"),
}
FORMAT_OF: dict[Naming, Format] = {"peft": "diffusers", "diffusers": "diffusers", "kohya": "flux"}
"""Whose module names a naming is written with."""
OTHER_PARTS = ("text_encoder", "lora_te")
"""How names of a text encoder start (diffusers loaders/lora_pipeline.py; sd-scripts networks/lora_flux.py)."""
HEAD_DIM = 128
"""Head size of every published FLUX and Open-Sora v2 model; an adapter alone does not tell it."""
OTHER_KINDS = (
    (r"lora_magnitude_vector|dora_scale", "DoRA's magnitude"),
    (r"(lora_A|lora_B|lora_down|lora_up)(\.\w+)?\.bias$", "a bias of the adapter (lora_bias)"),
    (r"lora_embedding_[AB]", "LoRA of an embedding"),
    (r"hada_w|lokr_w|lora_mid|oft_|ia3_l", "LoHa, LoKr, OFT or IA3"),
    (r"\.(diff|diff_b|set_weight|reshape_weight)$", "a whole difference"),
    (r"\.(weight|bias)$", "a whole tensor of the model (bias, modules_to_save)"),
)
"""What a tensor that is no plain pair looks like."""
_KEY = re.compile(r"^(?P<module>.+?)\.(?P<end>lora_A|lora_B|lora_down|lora_up|alpha)(?:\.default)?(?:\.weight)?$")
_BLOCKS: dict[str, tuple[str, str]] = {
    "flux": (r"(?:^|[._])double_blocks[._](\d+)[._]", r"(?:^|[._])single_blocks[._](\d+)[._]"),
    "diffusers": (r"(?:^|[._])(?<!single_)transformer_blocks[._](\d+)[._]", r"(?:^|[._])single_transformer_blocks[._](\d+)[._]"),
}


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """What an adapter adds to one weight: (alpha / r) b a."""

    a: Tensor
    """[r, in]"""
    b: Tensor
    """[out, r]"""
    alpha: float

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.a.shape[0]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter over the weights of one format; keys are weight names without `.weight`."""

    naming: Naming
    fmt: Format
    model: ModelConfig
    modules: dict[str, LowRank]


def looks_like_adapter(keys: Mapping[str, object]) -> bool:
    """Whether the tensors are a LoRA adapter's."""
    return any(re.search(r"\.lora_(A|B|up|down)\b", key) for key in keys)


def parse_adapter(tensors: Mapping[str, Tensor], *, settings: LoraSettings | None, model: ModelConfig | None) -> Adapter:
    """Read an adapter.

    Args:
        tensors: the file. Names may have the prefix of a naming or none (`save_lora_adapter` of diffusers writes none).
        settings: ranks and alphas of the adapter's configuration; None is a scale of 1 where the file has no alpha, as diffusers has it.
        model: the base model; None reads sizes from the adapter (head size 128).

    Raises:
        UserError: a key that is no plain LoRA (DoRA, LoKr, biases), a pair that is incomplete or of another shape, an unknown module, a
            rank or an alpha that differs from the configuration's.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            what = next((f" but {kind}" for pattern, kind in OTHER_KINDS if re.search(pattern, key)), "")
            raise UserError(f"adapter tensor {key!r} is no plain LoRA{what}; only lora_A/lora_B, lora_down/lora_up and alpha are supported")
        end = {"lora_A": "a", "lora_down": "a", "lora_B": "b", "lora_up": "b", "alpha": "alpha"}[match["end"]]
        parts.setdefault(match["module"], {})[end] = tensor
    naming, prefix = _naming(parts)
    pairs = {name: _pair(name, part, settings) for name, part in ((name.removeprefix(prefix), part) for name, part in parts.items())}
    return _resolve(pairs, naming, model)


def _pair(name: str, part: Mapping[str, Tensor], settings: LoraSettings | None) -> LowRank:
    a, b = part.get("a"), part.get("b")
    if a is not None and a.dim() > 2:
        raise UserError(f"adapter module {name} is of a convolution {list(a.shape)}; only linear layers are supported")
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise UserError(f"adapter module {name} is no pair [r, in], [out, r]")
    rank = a.shape[0]
    own = float(part["alpha"]) if "alpha" in part else None
    if settings is None:
        return LowRank(a=a, b=b, alpha=float(rank) if own is None else own)
    if settings.rank_of(name) != rank:
        raise UserError(f"adapter module {name} has rank {rank}, its configuration says {settings.rank_of(name)}; one of them is another's")
    alpha = settings.alpha_of(name)
    if own is not None and not isclose(own, alpha, rel_tol=1e-6):
        raise UserError(f"adapter module {name} has alpha {own:g} in the file and {alpha:g} by its configuration; remove one")
    return LowRank(a=a, b=b, alpha=alpha)


def _naming(parts: Mapping[str, object]) -> tuple[Naming, str]:
    """(naming, prefix of every name)."""
    for naming, prefix in PREFIXES.items():
        if all(name.startswith(prefix) for name in parts):
            return naming, prefix
    other = sorted(name for name in parts if name.startswith(OTHER_PARTS))
    if other:
        raise UserError(f"the adapter is also for a text encoder, for example {other[0]}; save the transformer's part on its own")
    if not any(name.startswith(tuple(PREFIXES.values())) for name in parts):
        return "diffusers", ""
    some = ", ".join(sorted(parts)[:2])
    raise UserError(f"adapter names start with none of {', '.join(PREFIXES.values())} throughout, for example {some}")


def _resolve(pairs: dict[str, LowRank], naming: Naming, model: ModelConfig | None) -> Adapter:
    """Find the weight format whose modules the adapter names."""
    failed = ""
    for fmt in ("flux", "diffusers", "opensora"):
        sizes = model or _sizes(pairs, "diffusers" if fmt == "diffusers" else "flux")
        if sizes is None:
            continue
        shapes = {key.removesuffix(".weight"): shape for key, shape in shapes_in(fmt, sizes).items() if key.endswith(".weight")}
        known = {name.replace(".", "_") if naming == "kohya" else name: name for name in shapes}
        unknown = sorted(name for name in pairs if name not in known)
        if unknown:
            failed = failed or f"module {unknown[0]}"
            continue
        modules = {known[name]: pair for name, pair in pairs.items()}
        for name, pair in modules.items():
            if (pair.b.shape[0], pair.a.shape[1]) != shapes[name]:
                raise UserError(
                    f"adapter module {name} is for a weight {[pair.b.shape[0], pair.a.shape[1]]}, the model's is {list(shapes[name])}"
                )
        return Adapter(naming=naming, fmt=fmt, model=sizes, modules=modules)
    raise UserError(f"the adapter's modules are not those of a FLUX, diffusers or Open-Sora MMDiT ({failed or 'no block is named'})")


def _sizes(pairs: Mapping[str, LowRank], style: str) -> ModelConfig | None:
    """Sizes an adapter tells: hidden from the inputs of attention, counts from block numbers; None when no block is named."""
    hidden = ffn = 0
    for name, pair in pairs.items():
        flat = name.replace(".", "_")
        if re.search(
            r"(attn_qkv|linear1|_q_proj|_k_proj|attn_to_[qkv]|add_[qkv]_proj|proj_mlp|mlp_0|net_0_proj|mod_lin|modulation_lin)$", flat
        ):
            hidden = pair.a.shape[1]
        if re.search(r"(mlp_0|net_0_proj|proj_mlp)$", flat):
            ffn = pair.b.shape[0]
        if flat.endswith("linear1"):
            ffn = pair.b.shape[0] - 3 * pair.a.shape[1]
    counts = []
    for pattern in _BLOCKS[style]:
        numbers = [int(match[1]) for name in pairs if (match := re.search(pattern, name))]
        counts.append(max(numbers, default=-1) + 1)
    if not hidden or sum(counts) == 0 or max(counts) > 10_000:
        return None
    head_dim = HEAD_DIM if hidden % HEAD_DIM == 0 else hidden
    return ModelConfig(
        hidden_size=hidden,
        num_attention_heads=hidden // head_dim,
        num_double_blocks=counts[0],
        num_single_blocks=counts[1],
        ffn_hidden_size=ffn or 4 * hidden,
        axes_dim=(head_dim // 8, 7 * head_dim // 16, 7 * head_dim // 16),
        guidance_embed=True,
        cond_embed=style == "flux",
    )


def convert_adapter(adapter: Adapter, fmt: Format) -> dict[str, LowRank]:
    """The same change of weights over another format's modules."""
    if fmt == adapter.fmt:
        return dict(adapter.modules)
    converted: dict[str, LowRank] = {}
    used: set[str] = set()
    for key, segments in compose(adapter.fmt, fmt, adapter.model).items():
        sources = {segment.key.removesuffix(".weight") for segment in segments}
        if key.endswith(".weight") and sources & adapter.modules.keys():
            converted[key.removesuffix(".weight")] = _stacked(adapter, segments)
            used |= sources
    unused = sorted(adapter.modules.keys() - used)
    if unused:
        raise UserError(f"{fmt} has no module for {', '.join(unused[:3])}")
    return converted


def _rows_of(pair: LowRank, segment: Segment, head_dim: int) -> Tensor:
    part = pair.b[segment.start : segment.start + segment.rows]
    return to_foreign_order(to_canonical_order(part, order=segment.undo, head_dim=head_dim), order=segment.apply, head_dim=head_dim)


def _stacked(adapter: Adapter, segments: tuple[Segment, ...]) -> LowRank:
    head_dim = adapter.model.head_dim
    pairs = [(segment, adapter.modules.get(segment.key.removesuffix(".weight"))) for segment in segments]
    present = [pair for _, pair in pairs if pair is not None]
    first = present[0]
    if all(pair is not None for _, pair in pairs) and all(torch.equal(pair.a, first.a) and pair.alpha == first.alpha for pair in present):
        return LowRank(
            a=first.a, b=torch.cat([_rows_of(pair, segment, head_dim) for segment, pair in pairs if pair is not None]), alpha=first.alpha
        )
    rank = sum(pair.a.shape[0] for pair in present)
    same_scale = all(pair.scale == first.scale for pair in present)
    b = first.b.new_zeros(sum(segment.rows for segment in segments), rank)
    row = column = 0
    for segment, pair in pairs:
        if pair is not None:
            block = _rows_of(pair, segment, head_dim)
            b[row : row + segment.rows, column : column + block.shape[1]] = (
                block if same_scale else (block.float() * pair.scale).to(b.dtype)
            )
            column += block.shape[1]
        row += segment.rows
    return LowRank(a=torch.cat([pair.a for pair in present]), b=b, alpha=rank * first.scale if same_scale else float(rank))


def adapter_tensors(modules: Mapping[str, LowRank], naming: Naming) -> dict[str, Tensor]:
    """The file of an adapter in a naming. PEFT keeps alpha in adapter_config.json, the others in the file."""
    down, up = ENDS[naming]
    tensors: dict[str, Tensor] = {}
    for name, pair in modules.items():
        stem = PREFIXES[naming] + (name.replace(".", "_") if naming == "kohya" else name)
        tensors[f"{stem}.{down}"], tensors[f"{stem}.{up}"] = pair.a, pair.b
        if naming != "peft":
            tensors[f"{stem}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float32)
    return tensors


def canonical_updates(adapter: Adapter) -> dict[str, LowRank]:
    """What the adapter adds to each canonical weight."""
    return {f"{name}.weight": pair for name, pair in convert_adapter(adapter, "megasora").items()}

"""Builds the chunks of one rank from settings and groups."""

from __future__ import annotations

from typing import Literal

import torch
from megatron.core.transformer import TransformerConfig

from megasora.config.errors import UserError
from megasora.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megasora.models.mmdit.kernels.composed import COMPOSED
from megasora.models.mmdit.kernels.contract import Kernels
from megasora.models.mmdit.megatron_config import DTYPES, transformer_config
from megasora.models.mmdit.model import MMDiT
from megasora.models.mmdit.spec import ProviderName, submodules_of
from megasora.models.mmdit.stages import stage_specs
from megasora.parallel.attention_kernels import KernelName, choose_kernel
from megasora.parallel.context import ContextAttention
from megasora.parallel.groups import ParallelContext


def choose_provider(name: Literal["auto", "te", "local"], *, device: torch.device, dtype: torch.dtype) -> ProviderName:
    """Layer provider for a device: `auto` takes Transformer Engine on CUDA in bf16 when it is installed.

    In fp32 it takes local layers: Transformer Engine multiplies fp32 matrices in TF32 on CUDA (10 bits of mantissa), torch does not.

    Raises:
        UserError: te on the CPU.
    """
    if name == "te" and device.type == "cpu":
        raise UserError("provider te needs CUDA; use --precision.provider local on the CPU")
    if name != "auto":
        return name
    return "te" if device.type == "cuda" and dtype == torch.bfloat16 and _installed("transformer_engine") else "local"


def choose_attention(name: Literal["auto", "te", "flash", "torch"], *, device: torch.device, dtype: torch.dtype) -> KernelName:
    """Attention kernel for a device: `auto` takes the fastest installed for each pack on CUDA in bf16, torch otherwise.

    Raises:
        UserError: te or flash on the CPU.
    """
    if name in ("te", "flash") and device.type == "cpu":
        raise UserError(f"attention {name} needs CUDA; use --precision.attention torch on the CPU")
    if name != "auto":
        return name
    return "fastest" if device.type == "cuda" and dtype == torch.bfloat16 else "torch"


def choose_kernels(name: Literal["auto", "triton", "torch"], *, device: torch.device, dtype: torch.dtype) -> Kernels:
    """What computes norms, gates, rotations and orders: `auto` takes Triton's kernels on CUDA in bf16 and fp32, torch elsewhere.

    Raises:
        UserError: triton on the CPU, or not installed.
    """
    if name == "triton" and device.type == "cpu":
        raise UserError("kernels triton need CUDA; use --precision.kernels torch on the CPU")
    if name == "torch" or device.type == "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return COMPOSED
    if not _installed("triton"):
        if name == "triton":
            raise UserError(
                "kernels triton need Triton, which torch's CUDA builds bring: pip install triton, or use --precision.kernels torch"
            )
        return COMPOSED
    from megasora.models.mmdit.kernels.fused import FUSED

    return FUSED


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def build_chunks(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    context: ParallelContext,
    dtype: torch.dtype | None = None,
) -> tuple[list[MMDiT], TransformerConfig]:
    """This rank's chunks of the model (one per virtual stage), uninitialised, and the Megatron configuration they share."""
    provider = choose_provider(precision.provider, device=context.device, dtype=dtype or DTYPES[precision.dtype])
    config = transformer_config(model, parallel, precision, device=context.device, provider=provider, dtype=dtype)
    kernel = choose_kernel(
        choose_attention(precision.attention, device=context.device, dtype=config.params_dtype),
        num_heads=model.num_attention_heads,
        head_dim=model.head_dim,
    )
    kernels = choose_kernels(precision.kernels, device=context.device, dtype=config.params_dtype)
    attention = ContextAttention(groups=context.context, kernel=kernel)
    chunks = [
        MMDiT(model, config=config, stage=stage, submodules=submodules_of(provider), context=context, attention=attention, kernels=kernels)
        for stage in stage_specs(model, parallel, pp_rank=context.at.pp)
    ]
    return chunks, config

"""Megatron-core's TransformerConfig for a run: the one place where our settings become its 176 fields."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

from megasora.config.errors import UserError
from megasora.config.pack_tokens import FP8_ROW_MULTIPLE
from megasora.config.schema import ModelConfig, ParallelConfig, PrecisionConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FP8_FORMAT = {"none": None, "delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
"""Float8 types: hybrid takes E5M2 for gradients, whose range one scale for a whole tensor needs; scales for small blocks let gradients keep
E4M3's third bit (Transformer Engine 2.11, common/recipe: the defaults of each recipe)."""


def row_multiple(config: TransformerConfig) -> int:
    """Rows that a stream's share must be a multiple of, for `PackSplit`."""
    return FP8_ROW_MULTIPLE[config.fp8_recipe if config.fp8 else "none"]


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    device: torch.device,
    provider: str,
    dtype: torch.dtype | None = None,
) -> TransformerConfig:
    """Megatron-core configuration of one stage.

    Args:
        model, parallel, precision: the run's settings.
        device: this rank's device.
        provider: `te` or `local`.
        dtype: parameters and activations; None takes precision.dtype (fp64 serves the exact parity tests).

    Raises:
        UserError: FP8 without Transformer Engine, which Megatron-core would ignore in silence.
    """
    if precision.fp8 != "none" and provider != "te":
        raise UserError(f"fp8={precision.fp8} needs the te provider on CUDA; use --precision.fp8 none")
    dtype = dtype or DTYPES[precision.dtype]
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    on_cpu = device.type == "cpu"
    return TransformerConfig(
        num_layers=parallel.pipeline_model_parallel_size * parallel.num_model_chunks,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.tensor_model_parallel_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp8=FP8_FORMAT[precision.fp8],
        fp8_recipe=None if precision.fp8 == "none" else precision.fp8,
        use_cpu_initialization=on_cpu,
        perform_initialization=False,
        gradient_accumulation_fusion=provider == "te" and parallel.zero_stage == 1,  # it adds to a buffer of whole gradients
        calculate_per_token_loss=True,
        qk_layernorm=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,  # Megatron waits for the device at each message, as torch before pytorch/pytorch#82450 (2022) needed
        deallocate_pipeline_outputs=not on_cpu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )

"""Attention kernels that know nothing of context parallelism: full attention inside each sample of a thd tensor.

`torch` runs everywhere (scaled_dot_product_attention, sample by sample, or one batched call when all lengths agree); `flash` and `te` are
CUDA packages imported in their adapter; `fastest` takes torch or one of them for each pack. The ring needs a chunk's log-sum-exp and a
backward that takes the merged one: `chunk_forward`, `chunk_backward`.
Layout thd: [tokens, heads, head size], tokens grouped by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megasora import cudnn
from megasora.config.errors import UserError
from megasora.parallel.pack import AttentionOrder

KernelName = Literal["torch", "flash", "te", "fastest"]
Kernel = Callable[[Tensor, Tensor, Tensor, AttentionOrder], Tensor]
PACKAGES: dict[KernelName, str] = {"te": "transformer_engine", "flash": "flash_attn"}
"""Kernels for samples of any lengths, the fastest first."""


class ChunkResult(NamedTuple):
    """Attention of queries over one chunk of keys."""

    out: Tensor
    """[tokens, heads, head size], normalised within the chunk."""
    lse: Tensor
    """[tokens, heads], log of the sum of exp(scores) over the chunk, fp32 (fp64 for fp64 inputs)."""


def torch_attention(q: Tensor, k: Tensor, v: Tensor, order: AttentionOrder) -> Tensor:
    """Full attention inside each sample by torch's scaled_dot_product_attention."""
    lengths = order.lengths
    if len(set(lengths)) == 1:
        qb, kb, vb = _batched(q, k, v, samples=len(lengths))
        batched = F.scaled_dot_product_attention(qb, kb, vb)
        return batched.transpose(1, 2).reshape(q.shape)
    parts = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in triple))[0].transpose(0, 1)
        for triple in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    return torch.cat(parts)


def _batched(q: Tensor, k: Tensor, v: Tensor, *, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """[samples, heads, tokens, head size] views of thd tensors whose samples are equally long."""
    qb, kb, vb = (x.unflatten(0, (samples, -1)).transpose(1, 2) for x in (q, k, v))
    return qb, kb, vb


def _fastest_attention(otherwise: Kernel) -> Kernel:
    """torch's cuDNN kernel where all samples of a pack are equally long, `otherwise` elsewhere.

    Forward and backward on an H100 it takes 0.92 to 0.95 of the time of Transformer Engine's, which takes any lengths (benchmarks/results,
    2026-11-27).
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, order: AttentionOrder) -> Tensor:
        if len(set(order.lengths)) == 1 and _by_cudnn(*_batched(q, k, v, samples=len(order.lengths))):
            return torch_attention(q, k, v, order)
        return otherwise(q, k, v, order)

    return attend


def _flash_attention() -> Kernel:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise UserError(
            'attention=flash needs flash-attn on CUDA: pip install "megasora[flash]", or use --precision.attention torch'
        ) from error

    def attend(q: Tensor, k: Tensor, v: Tensor, order: AttentionOrder) -> Tensor:
        cu = order.cu_seqlens.to(q.device, non_blocking=True)
        out: Tensor = flash_attn_varlen_func(q, k, v, cu, cu, order.max_seqlen, order.max_seqlen)
        return out

    return attend


def _te_attention(*, num_heads: int, head_dim: int) -> Kernel:
    try:
        from transformer_engine.pytorch import DotProductAttention
    except ImportError as error:
        raise UserError(
            'attention=te needs Transformer Engine on CUDA: pip install "megasora[gpu]", or use --precision.attention torch'
        ) from error
    modules: dict[int, torch.nn.Module] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, order: AttentionOrder) -> Tensor:
        heads = q.shape[1]
        if heads not in modules:
            modules[heads] = DotProductAttention(heads, head_dim, attention_dropout=0.0, qkv_format="thd", attn_mask_type="padding")
        cu = order.cu_seqlens.to(q.device, non_blocking=True)
        longest = order.max_seqlen
        q, k, v = (x.contiguous() for x in (q, k, v))
        try:
            out: Tensor = modules[heads](q, k, v, cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=longest, max_seqlen_kv=longest)
        except RuntimeError as error:
            _refuse_two_cudnns(error)
            raise
        return out.view(q.shape)

    return attend


def _refuse_two_cudnns(error: RuntimeError) -> None:
    """Say what a failure inside cuDNN means when the process holds two of them.

    Raises:
        UserError: it does.
    """
    if "cuDNN" in str(error) and len(found := cudnn.loaded()) > 1:
        raise UserError(
            f"attention failed in cuDNN, of which this process loaded {len(found)}: {' and '.join(found)}; "
            f"set {cudnn.NAMED_BY[0]} to the folder of torch's ({cudnn.of_torchs_wheel() or 'pip show -f nvidia-cudnn-cu13 names it'}) "
            "before the start"
        ) from error


def choose_kernel(name: KernelName, *, num_heads: int, head_dim: int) -> Kernel:
    """The attention kernel called `name`; fastest: torch's where it is, else te, flash or torch, the first that is installed.

    Raises:
        UserError: its package is not installed.
    """
    if name == "flash":
        return _flash_attention()
    if name == "te":
        return _te_attention(num_heads=num_heads, head_dim=head_dim)
    if name == "fastest":
        for other, package in PACKAGES.items():
            if find_spec(package) is not None:
                return _fastest_attention(choose_kernel(other, num_heads=num_heads, head_dim=head_dim))
    return torch_attention


def chunk_forward(q: Tensor, k: Tensor, v: Tensor, *, q_lengths: Sequence[int], k_lengths: Sequence[int]) -> ChunkResult:
    """Attention of each sample's queries over that sample's keys in one chunk; no autograd.

    A sample without keys in the chunk gives out = 0 and lse = -inf, which merges as nothing.
    """
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=_lse_dtype(q), device=q.device)
    start_q = start_k = 0
    for num_q, num_k in zip(q_lengths, k_lengths, strict=True):
        if num_q and num_k:
            rows, columns = slice(start_q, start_q + num_q), slice(start_k, start_k + num_k)
            part, part_lse = _dense_forward(*(x.transpose(0, 1)[None].contiguous() for x in (q[rows], k[columns], v[columns])))
            out[rows] = part[0].transpose(0, 1)
            lse[rows] = part_lse[0, :, :num_q].transpose(0, 1)
        start_q, start_k = start_q + num_q, start_k + num_k
    return ChunkResult(out, lse)


def chunk_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    merged: ChunkResult,
    q_lengths: Sequence[int],
    k_lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through one chunk, given the output and log-sum-exp merged over all chunks (so the chunks' gradients just add)."""
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    start_q = start_k = 0
    for num_q, num_k in zip(q_lengths, k_lengths, strict=True):
        if num_q and num_k:
            rows, columns = slice(start_q, start_q + num_q), slice(start_k, start_k + num_k)
            grad_h, q_h, k_h, v_h, out_h = (
                x.transpose(0, 1)[None].contiguous() for x in (grad[rows], q[rows], k[columns], v[columns], merged.out[rows])
            )
            lse_h = merged.lse[rows].transpose(0, 1)[None].contiguous()
            parts = _dense_backward(grad_h, q_h, k_h, v_h, out_h, lse_h)
            for target, where, part in zip((grad_q, grad_k, grad_v), (rows, columns, columns), parts, strict=True):
                target[where] = part[0].transpose(0, 1)
        start_q, start_k = start_q + num_q, start_k + num_k
    return grad_q, grad_k, grad_v


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _by_cudnn(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch would give these to cuDNN: on Hopper it attends 1.6 times as fast as torch's flash kernel (benchmarks/results)."""
    cuda = torch.backends.cuda
    return bool(cuda.cudnn_sdp_enabled() and cuda.can_use_cudnn_attention(cuda.SDPAParams(q, k, v, None, 0.0, False, False)))


def _dense_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out [1,h,s,d], lse [1,h,s]) by torch's fastest kernel of the device; [1, heads, tokens, head size] inputs."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif _by_cudnn(q, k, v):
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
        lse = lse.view(q.shape[:3])
    elif q.dtype in (torch.bfloat16, torch.float16):
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    else:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return out, lse


def _dense_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_dense_forward` for a given output and log-sum-exp."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)
        return parts[0], parts[1], parts[2]
    if _by_cudnn(q, k, v):
        none = torch.zeros((), dtype=torch.int64, device=q.device)
        parts = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse.unsqueeze(-1), none, none, None, None, None, q.shape[2], k.shape[2], 0.0, False
        )
        return parts[0], parts[1], parts[2]
    if q.dtype in (torch.bfloat16, torch.float16):
        zero = torch.zeros((), dtype=torch.int64, device=q.device)
        parts = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, zero, zero
        )
        return parts[0], parts[1], parts[2]
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    weights = torch.exp(scores - lse.unsqueeze(-1))
    grad_weights = torch.matmul(grad, v.transpose(-1, -2))
    grad_scores = weights * (grad_weights - (grad * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return torch.matmul(grad_scores, k), torch.matmul(grad_scores.transpose(-1, -2), q), torch.matmul(weights.transpose(-1, -2), grad)

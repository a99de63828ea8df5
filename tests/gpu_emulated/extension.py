"""`transformer_engine_torch` (Transformer Engine 2.11's compiled module) in plain torch: what its kernels compute, on the CPU.

Transformer Engine's own Python (linear layers, recipes, quantised tensors, FusedAdam, attention) runs unchanged above it. Emulated: matrix
products in fp32, bf16 and FP8 with the kernels' alignment rules, quantisation per tensor (current and delayed scaling) and per block with
real float8 types, the update of delayed scales, Adam, norms of lists of tensors, full attention inside the sequences of a thd batch.
Everything else is there by name, because Transformer Engine imports names it does not use here, and refuses when called.

`CALLS` logs what ran, so that tests can count FP8 matrix products. Numbers are those of the formats; the order of summation is torch's.
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Call(NamedTuple):
    """One call of the emulated module."""

    kind: str
    """gemm, quantize, adam, amax_update, attention_forward, attention_backward."""
    detail: Any
    """Of a gemm: fp8, bf16 or fp32; of adam: the step; of a quantize: the quantizer's class; of an amax_update: how many scales."""


CALLS: list[Call] = []
"""What ran in this process since the test cleared it."""


class EmulationError(AssertionError):
    """The real kernel would refuse this call."""


def _enum(name: str, *values: str) -> Any:
    return enum.IntEnum(name, {value: number for number, value in enumerate(values)})


DType = _enum(
    "DType",
    *("kByte", "kInt16", "kInt32", "kInt64", "kFloat32", "kFloat16", "kBFloat16"),
    *("kFloat8E4M3", "kFloat8E5M2", "kFloat8E8M0", "kFloat4E2M1"),
)
BlockFormat = _enum("Float8BlockScaleTensorFormat", "GEMM_READY", "COMPACT")
AttentionBackend = _enum("NVTE_Fused_Attn_Backend", "NVTE_F16_max512_seqlen", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8", "NVTE_No_Backend")
_FP8 = {DType.kFloat8E4M3: (torch.float8_e4m3fn, 448.0), DType.kFloat8E5M2: (torch.float8_e5m2, 57344.0)}
"""TE type -> torch type, largest finite value (OCP 8-bit floating point specification, table 1)."""
_PLAIN = {DType.kFloat32: torch.float32, DType.kBFloat16: torch.bfloat16, DType.kFloat16: torch.float16}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_BLOCK = 128


# --- quantisation -----------------------------------------------------------------------------------------------------------------------


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """A quantised copy, as the quantizer's class asks for it."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    assert noop is None, "no skipped updates here"
    out = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if output is None else output
    CALLS.append(Call("quantize", type(quantizer).__name__))
    wide = tensor.detach().float()
    if isinstance(quantizer, Float8BlockQuantizer):
        _quantize_blocks(wide, quantizer, out)
    elif isinstance(quantizer, (Float8CurrentScalingQuantizer, Float8Quantizer)):
        _quantize_tensor(wide, quantizer, out, current=isinstance(quantizer, Float8CurrentScalingQuantizer))
    else:
        raise NotImplementedError(f"{type(quantizer).__name__} is not emulated: Hopper has no such format")
    return out


def _quantize_tensor(wide: Tensor, quantizer: Any, out: Any, *, current: bool) -> None:
    kind, largest = _FP8[quantizer.dtype]
    amax = wide.abs().max().reshape(1)
    if current:
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = torch.where(amax > 0, largest / amax, torch.ones_like(amax))
    else:
        scale = quantizer.scale.reshape(1).clone()
        quantizer.amax.copy_(torch.maximum(quantizer.amax.reshape(1), amax).reshape(quantizer.amax.shape))
    data = (wide * scale).clamp(-largest, largest).to(kind).view(torch.uint8)
    out._data = data if quantizer.rowwise_usage else None
    out._transpose = data.reshape(-1, data.shape[-1]).t().contiguous() if quantizer.columnwise_usage else None
    out._transpose_invalid = out._transpose is None
    out._scale_inv = 1 / scale


def _quantize_blocks(wide: Tensor, quantizer: Any, out: Any) -> None:
    rows = wide.reshape(-1, wide.shape[-1])
    compact = out._data_format == BlockFormat.COMPACT
    square = quantizer.block_scaling_dim == 2
    if quantizer.rowwise_usage:
        data, scales = _blocks(rows, _BLOCK if square else 1, quantizer)
        out._rowwise_data.copy_(data.view(torch.uint8).reshape(out._rowwise_data.shape))
        _place(out._rowwise_scale_inv, scales if square or compact else scales.t())
    if quantizer.columnwise_usage:
        data, scales = _blocks(rows.t(), _BLOCK if square else 1, quantizer)  # blocks run down a column
        stored = data.t() if compact else data
        out._columnwise_data.copy_(stored.contiguous().view(torch.uint8).reshape(out._columnwise_data.shape))
        _place(out._columnwise_scale_inv, scales if square else scales.t())


def _blocks(rows: Tensor, height: int, quantizer: Any) -> tuple[Tensor, Tensor]:
    """(float8 [M, K], inverse scales [ceil(M / height), ceil(K / 128)]) of blocks of `height` rows and 128 columns."""
    kind, largest = _FP8[quantizer.dtype]
    m, k = rows.shape
    padded = F.pad(rows, (0, -k % _BLOCK, 0, -m % height))
    tiled = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // _BLOCK, _BLOCK)
    amax = tiled.abs().amax((1, 3), keepdim=True).clamp_min(quantizer.amax_epsilon)
    scale = torch.where(amax > 0, largest / amax, torch.ones_like(amax))
    if quantizer.force_pow_2_scales:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    data = (tiled * scale).clamp(-largest, largest).reshape(padded.shape)[:m, :k].contiguous().to(kind)
    return data, (1 / scale)[:, 0, :, 0]


def _place(target: Tensor, values: Tensor) -> None:
    """Write scales into their padded tensor."""
    target.zero_()
    target[: values.shape[0], : values.shape[1]] = values


def _plain(tensor: Any, *, rowwise: bool) -> Tensor:
    """fp32 values of a matrix product's operand, from the copy the kernel would read."""
    if hasattr(tensor, "_is_2D_scaled"):
        data = tensor._rowwise_data if rowwise else tensor._columnwise_data
        if data is None:
            raise EmulationError(f"the product reads {'row' if rowwise else 'column'}wise data of a tensor that has none")
        return _only(tensor, rowwise=rowwise).dequantize(dtype=torch.float32)
    if hasattr(tensor, "_fp8_dtype"):
        kind, _ = _FP8[tensor._fp8_dtype]
        data = tensor._data if tensor._data is not None else tensor._transpose.t().contiguous()
        return data.view(kind).float() * tensor._scale_inv
    return tensor.detach().float()


def _only(tensor: Any, *, rowwise: bool) -> Any:
    """The same block-scaled tensor with one of its two copies."""
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

    return Float8BlockwiseQTensorStorage(
        rowwise_data=tensor._rowwise_data if rowwise else None,
        rowwise_scale_inv=tensor._rowwise_scale_inv if rowwise else None,
        columnwise_data=None if rowwise else tensor._columnwise_data,
        columnwise_scale_inv=None if rowwise else tensor._columnwise_scale_inv,
        fp8_dtype=tensor._fp8_dtype,
        quantizer=tensor._quantizer,
        is_2D_scaled=tensor._is_2D_scaled,
        data_format=tensor._data_format,
    )


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    """A plain copy of a tensor with one scale."""
    return _plain(tensor, rowwise=True).to(_PLAIN[dtype])


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """Bytes of the transposed matrix."""
    made = data.reshape(-1, data.shape[-1]).t().contiguous()
    return made if out is None else out.copy_(made)


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """(bias gradient, quantised gradient)."""
    return gradient.float().reshape(-1, gradient.shape[-1]).sum(0).to(gradient.dtype), quantize(gradient, quantizer)


def fused_amax_and_scale_update_after_reduction(
    buffer: Tensor, histories: Sequence[Tensor], scales: Sequence[Tensor], algorithm: str, dtype: Any, margin: float
) -> None:
    """New delayed scales from the histories' maxima."""
    CALLS.append(Call("amax_update", len(scales)))
    largest, start = _FP8[dtype][1], 0
    for history, scale in zip(histories, scales, strict=True):
        width = history.shape[1]
        history[0].copy_(buffer[start : start + width])
        start += width
        amax = history.max(0).values if algorithm == "max" else history[0].clone()
        new = largest / amax / 2.0**margin
        scale.copy_(torch.where((amax > 0) & torch.isfinite(amax), new, scale))
        history.copy_(torch.roll(history, -1, 0))
        history[0].zero_()


# --- matrix products --------------------------------------------------------------------------------------------------------------------


def generic_gemm(
    a: Any,
    transposed_a: bool,
    b: Any,
    transposed_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    **more: Any,
) -> tuple[Tensor, Tensor | None, None, Tensor | None]:
    """cuBLAS sees column-major matrices, so in rows it is out = op(b) @ op(a); with `grad` the bias is the sum over b's rows."""
    if quantizer is not None or gelu or more.get("comm_overlap") is not None or more.get("alpha", 1.0) != 1.0:
        raise NotImplementedError("a matrix product with quantised output, GELU, overlapped communication or alpha is not emulated")
    left, right = _plain(b, rowwise=not transposed_b), _plain(a, rowwise=transposed_a)
    shape_b = left.shape
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    fp8 = hasattr(a, "_fp8_dtype")
    if fp8 != hasattr(b, "_fp8_dtype"):
        raise EmulationError("one operand of the product is FP8, the other is not")
    CALLS.append(Call("gemm", "fp8" if fp8 else _NAMES[a.dtype]))
    if fp8:
        _check_alignment(left, right)
    product = (left.t() if transposed_b else left) @ (right.t() if transposed_a else right)
    if bias is not None and not grad:
        product = product + bias.float()
    bias_grad = left.sum(0).to(bias.dtype) if bias is not None and grad else None
    if out is not None:
        if out.shape != product.shape:
            raise EmulationError(f"out is {tuple(out.shape)}, the product {tuple(product.shape)}")
        out.copy_(out.float() + product if accumulate else product)
        return out, bias_grad, None, more.get("extra_output")
    shape = product.shape if transposed_b else (*shape_b[:-1], product.shape[-1])
    return product.to(_PLAIN[out_dtype] if out_dtype is not None else torch.bfloat16).reshape(shape), bias_grad, None, None


def _check_alignment(*matrices: Tensor) -> None:
    """Rows in eights, columns in sixteens (Transformer Engine 2.11, pytorch/utils.py assert_dim_for_fp8_exec)."""
    for matrix in matrices:
        if matrix.shape[0] % 8 or matrix.shape[1] % 16:
            raise EmulationError(f"an FP8 product takes rows in eights and columns in sixteens, got {tuple(matrix.shape)}")


# --- lists of tensors -------------------------------------------------------------------------------------------------------------------


def multi_tensor_adam(
    chunk_size: int,
    overflow: Tensor,
    lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """AdamW (mode 1) on lists of gradients, parameters and both moments (Loshchilov and Hutter, algorithm 2)."""
    if not mode:
        raise NotImplementedError("Adam with L2 regularisation is not emulated")
    CALLS.append(Call("adam", step))
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, mean, square in zip(*lists, strict=True):
        wide = gradient.float()
        mean.mul_(beta1).add_(wide, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
        update = mean / first / ((square / second).sqrt() + eps) + weight_decay * parameter.float()
        parameter.add_(update, alpha=-lr)


def multi_tensor_l2norm(
    chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """(norm over all, norms of each)."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms


def multi_tensor_scale(chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], scale: float | Tensor) -> None:
    """second = first x scale."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


# --- attention --------------------------------------------------------------------------------------------------------------------------


def get_fused_attn_backend(*_: Any) -> Any:
    """cuDNN's flash attention takes every call we make on Hopper (docs of cuDNN 9, head sizes up to 256)."""
    return AttentionBackend.NVTE_F16_arbitrary_seqlen


def _sequences(cu_seqlens: Tensor) -> list[slice]:
    ends = cu_seqlens.tolist()
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def _attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, scale=scale)[0].transpose(0, 1)


def _refuse_attention(mask: Any, layout: Any, *tensors: Tensor) -> None:
    if not str(layout).startswith("NVTE_QKV_Layout.NVTE_THD"):
        raise NotImplementedError(f"attention in the layout {layout} is not emulated")
    if "CAUSAL" in str(mask):
        raise EmulationError("attention here is full, never causal")
    if any(not tensor.is_contiguous() for tensor in tensors):
        raise EmulationError("cuDNN takes contiguous tensors here")


def fused_attn_fwd(*arguments: Any) -> list[Tensor]:
    """Attention inside each sequence, fp32 inside; see cpp_extensions/fused_attn.py for the order of arguments."""
    scale, dropout, layout, mask, cu_seqlens = arguments[3], arguments[4], arguments[6], arguments[8], arguments[11]
    q, k, v = arguments[13:16]
    assert not dropout, "no dropout here"
    _refuse_attention(mask, layout, q, k, v)
    CALLS.append(Call("attention_forward", _NAMES[q.dtype]))
    out = torch.zeros_like(q)
    for rows in _sequences(cu_seqlens):
        out[rows] = _attend(*(x[rows].float() for x in (q, k, v)), scale=scale).to(q.dtype)
    return [out, torch.zeros(1), torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(*arguments: Any) -> list[Tensor | None]:
    """Gradients of `fused_attn_fwd`."""
    scale, layout, mask, cu_seqlens = arguments[2], arguments[5], arguments[7], arguments[11]
    q, k, v, _, gradient = arguments[13:18]
    _refuse_attention(mask, layout, q, k, v, gradient)
    CALLS.append(Call("attention_backward", _NAMES[q.dtype]))
    gradients = [torch.zeros_like(x) for x in (q, k, v)]
    for rows in _sequences(cu_seqlens):
        leaves = [x[rows].float().detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            found = torch.autograd.grad(_attend(*leaves, scale=scale), leaves, gradient[rows].float())
        for target, value in zip(gradients, found, strict=True):
            target[rows] = value.to(target.dtype)
    return [*gradients, None, None]


# --- the module -------------------------------------------------------------------------------------------------------------------------


class _Names:
    """An enumeration of which only the names matter."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, value: str) -> str:
        return f"{self._name}.{value}"


class RefusingModule(types.ModuleType):
    """A module that has every name; what is not set refuses when called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name} is not emulated: nothing here should need it")

        return refuse


def build_module() -> types.ModuleType:
    """The module object, to stand in sys.modules before Transformer Engine is imported."""
    module: Any = RefusingModule("transformer_engine_torch")
    emulated = (
        *(quantize, dequantize, fp8_transpose, bgrad_quantize, fused_amax_and_scale_update_after_reduction, generic_gemm),
        *(multi_tensor_adam, multi_tensor_l2norm, multi_tensor_scale, get_fused_attn_backend, fused_attn_fwd, fused_attn_bwd),
    )
    for function in emulated:
        setattr(module, function.__name__, function)
    module.DType, module.Float8BlockScaleTensorFormat = DType, BlockFormat
    module.NVTE_Fused_Attn_Backend = AttentionBackend
    gemms = [f"GEMM{number}_{part}" for number in (1, 2, 3) for part in ("INPUT", "WEIGHT", "OUTPUT")]
    module.FP8FwdTensors = _enum("FP8FwdTensors", *gemms)
    module.FP8BwdTensors = _enum("FP8BwdTensors", *(f"GRAD_{part}{number}" for number in (1, 2, 3) for part in ("OUTPUT", "INPUT")))
    module.CommOverlapType, module.CommOverlapAlgo = _enum("CommOverlapType", "RS", "AG"), _enum("CommOverlapAlgo", "NONE")
    for name in ("NVTE_Bias_Type", "NVTE_Mask_Type", "NVTE_QKV_Layout", "NVTE_QKV_Format", "NVTE_Softmax_Type"):
        setattr(module, name, _Names(name))
    for name in ("CommOverlap", "CommOverlapP2P", "CommOverlapHelper", "CommOverlapBase"):
        setattr(module, name, type(name, (), {}))
    answers = {"get_cublasLt_version": 130000, "get_cudnn_version": 91900, "get_num_cublas_streams": 4}
    for name, answer in answers.items():
        setattr(module, name, lambda *_, answer=answer: answer)
    return module


def install() -> None:
    """Make `import transformer_engine_torch` give the emulation."""
    assert "transformer_engine" not in sys.modules, "install the emulation before Transformer Engine is imported"
    sys.modules["transformer_engine_torch"] = build_module()

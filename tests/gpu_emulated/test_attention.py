"""Which attention kernel runs on GPUs, and that its numbers are the others'."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megasora.parallel.attention_kernels import KernelName, choose_kernel, chunk_backward, chunk_forward
from megasora.parallel.pack import Pack, PackSplit, SampleShape
from tests.gpu_emulated import emulation
from tests.gpu_emulated.extension import CALLS
from tests.gpu_emulated.memory import watch
from tests.pool import RankPool

HEADS, SIZE = 2, 16
BF16 = 2.0**-7
"""||a - b|| / ||b||: two roundings of an output of about 1."""


def tensors(tokens: int, number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, HEADS, SIZE, generator=generator).to("cuda", torch.bfloat16) for _ in range(number)]


def attend(rank: int, name: KernelName, lengths: list[int]) -> tuple[list[Tensor], list[str]]:
    """(output and gradients, calls of Transformer Engine's kernels)."""
    CALLS.clear()
    samples = [SampleShape(text_tokens=1, grid=(1, 1, length - 1)) for length in lengths]
    order = Pack(samples, split=PackSplit(), device=torch.device("cuda")).attention_order([0])
    *leaves, grad = tensors(sum(lengths), 4)
    for leaf in leaves:
        leaf.requires_grad_()
    out = choose_kernel(name, num_heads=HEADS, head_dim=SIZE)(*leaves, order)
    grads = torch.autograd.grad(out, leaves, grad)
    return [out.detach(), *grads], [call.kind for call in CALLS if call.kind.startswith("attention")]


def gap(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def test_packs_of_equal_lengths_go_to_torchs_cudnn_kernel_and_others_to_transformer_engine(gpus: RankPool) -> None:
    for lengths, calls in (([12, 12, 12], []), ([31], []), ([12, 7, 17], ["attention_forward", "attention_backward"])):
        ((found, seen),) = gpus.run(1, attend, "fastest", lengths)
        assert seen == calls
        ((expected, _),) = gpus.run(1, attend, "te", lengths)
        assert gap(found, expected) < BF16


def ring_chunk(rank: int, q_lengths: list[int], k_lengths: list[int], by_cudnn: bool) -> tuple[list[Tensor], int]:
    """(everything a chunk gives, calls of the cuDNN kernel)."""
    calls = 0

    def counted(kernel: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return kernel(*args)

        return call

    cudnn = {op: counted(kernel) for op, kernel in emulation._KERNELS.items() if "cudnn" in str(op)}
    lengths = {"q_lengths": q_lengths, "k_lengths": k_lengths}
    with (
        mock.patch.dict(emulation._KERNELS, cudnn),
        mock.patch.object(torch.backends.cuda, "cudnn_sdp_enabled", return_value=by_cudnn),
        watch(),  # their device is cuda
    ):
        q, grad = tensors(sum(q_lengths), 2)
        k, v = tensors(sum(k_lengths), 2)
        merged = chunk_forward(q, k, v, **lengths)
        return [*merged, *chunk_backward(grad, q, k, v, merged=merged, **lengths)], calls


def test_a_chunk_of_the_ring_is_the_same_by_cudnn_and_by_flash(gpus: RankPool) -> None:
    """Also where a sample has no keys in the chunk, or one, which cuDNN does not take. Both are emulated by one kernel of the CPU."""
    for q_lengths, k_lengths, calls in (([9, 6], [5, 8], 4), ([9, 6], [5, 0], 2), ([9, 6], [1, 8], 2)):
        ((by_cudnn, counted),) = gpus.run(1, ring_chunk, q_lengths, k_lengths, True)
        ((by_flash, none),) = gpus.run(1, ring_chunk, q_lengths, k_lengths, False)
        assert (counted, none) == (calls, 0)
        assert all(torch.equal(a, b) for a, b in zip(by_cudnn, by_flash, strict=True))

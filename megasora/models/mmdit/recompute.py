"""What a block keeps for its backward pass: everything, its matrix products and attention (`selective`), or its inputs alone (`full`).

Selective recomputation frees the storage of a tensor once its consumer has run, and fills it again, by running the producer a second time,
when the gradient of the consumer's output is there. The graph is the one without recomputation, so gradients are the same to the bit.
Megatron-core's `CheckpointWithoutOutput` does the same through a re-entrant backward of the producer and copies of every random state; here
producers are pure (no dropout, no communication), and a tensor that its consumer did not keep is left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

Result = TypeVar("Result")
Producer = Callable[..., Tensor | tuple[Tensor, ...]]


def discard(outputs: Tensor | tuple[Tensor, ...], producer: Producer, *inputs: Tensor, until: Tensor) -> None:
    """Free what `producer(*inputs)` returned and compute it again once the gradient of `until` is there.

    Args:
        outputs: what the producer returned; nothing after this call may read it in the forward pass. Outputs that are views of an input
            stay as they are.
        producer: a function of the inputs without side effects; what else it uses must outlive the backward pass unchanged.
        inputs: kept, or filled again by an earlier hook.
        until: a tensor whose gradient is computed before anything needs the outputs: their consumer's output.
    """
    if not (torch.is_grad_enabled() and until.requires_grad):
        return
    kept = {_storage(tensor) for tensor in inputs}
    freed = [None if _storage(output) in kept else _Freed.of(output) for output in _as_tuple(outputs)]
    if any(freed):
        until.register_hook(_Refill(producer, [tensor.detach() for tensor in inputs], freed))
    for output in freed:
        if output is not None:
            output.tensor.untyped_storage().resize_(0)


class _Freed(NamedTuple):
    """A tensor whose storage is emptied."""

    tensor: Tensor
    """The same storage with a version of its own: autograd compares the version of what it saved."""
    nbytes: int
    """Of the storage."""

    @classmethod
    def of(cls, tensor: Tensor) -> _Freed:
        return cls(tensor.data, tensor.untyped_storage().nbytes())


class _Refill:
    """A gradient hook that runs once and then holds nothing: hooks live until the whole graph is gone."""

    def __init__(self, producer: Producer, inputs: Sequence[Tensor], freed: Sequence[_Freed | None]) -> None:
        self.work: tuple[Producer, Sequence[Tensor], Sequence[_Freed | None]] | None = (producer, inputs, freed)

    def __call__(self, _gradient: Tensor) -> None:
        if self.work is None:
            return
        (producer, inputs, freed), self.work = self.work, None
        own = Counter(_storage(output.tensor) for output in freed if output is not None)
        wanted = [output if output is not None and _is_held(output.tensor, besides=own) else None for output in freed]
        if not any(wanted):
            return  # the consumer kept something else, such as a copy in FP8
        with torch.no_grad():
            for output, again in zip(wanted, _as_tuple(producer(*inputs)), strict=True):
                if output is not None:
                    output.tensor.untyped_storage().resize_(output.nbytes)
                    output.tensor.copy_(again)


def _is_held(tensor: Tensor, *, besides: Mapping[int, int]) -> bool:
    """Whether its storage has users besides so many tensors (and the handle that asks)."""
    storage = _storage(tensor)
    count: int = torch._C._storage_Use_Count(storage)
    return count > besides[storage] + 1


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


@dataclass(frozen=True, kw_only=True)
class Seams:
    """Where a block says what is cheap to compute again; does nothing unless `selective`."""

    selective: bool = False

    def through(self, producer: Producer, *inputs: Tensor, into: Callable[..., Result]) -> Result:
        """into(*producer(*inputs)) without keeping what is passed between them; `into` returns a tensor and keeps its arguments."""
        outputs = producer(*inputs)
        result = into(*_as_tuple(outputs))
        assert not self.selective or isinstance(result, Tensor), "the gradient of a tensor says when to compute again"
        if isinstance(result, Tensor):
            self.discard(outputs, producer, *inputs, until=result)
        return result

    def discard(self, outputs: Tensor | tuple[Tensor, ...], producer: Producer, *inputs: Tensor, until: Tensor) -> None:
        """`discard` when selective."""
        if self.selective:
            discard(outputs, producer, *inputs, until=until)


def keep_original_inputs(block: nn.Module, config: TransformerConfig) -> None:
    """With FP8, let Transformer Engine's layers keep the bf16 tensor they were given, which `discard` can free, instead of a copy in FP8;
    they quantise it again in the backward pass. Delayed scaling has no such mode and keeps its copies."""
    if config.fp8 is None or config.fp8_recipe == "delayed":
        return
    for module in block.modules():
        if hasattr(module, "save_original_input"):
            module.save_original_input = True  # type: ignore[assignment]


def keep_inputs_only(run: Callable[..., Any], *tensors: Tensor, config: TransformerConfig, tp_group: dist.ProcessGroup) -> Any:
    """Run a block so that its backward pass runs it again from its inputs.

    `vec` must be one of the tensors: both checkpoints are re-entrant, so a tensor that is merely closed over would lose its gradient.
    Megatron's would recompute outside the FP8 context, so with FP8 it is Transformer Engine's, which enters the context again and keeps
    the scales of the forward pass.
    """
    if not torch.is_grad_enabled():
        return run(*tensors)
    if config.fp8 is None:
        return tensor_parallel.checkpoint(run, False, *tensors)
    from megatron.core.extensions.transformer_engine import te_checkpoint

    return te_checkpoint(run, False, tensor_parallel.random.get_cuda_rng_tracker, tp_group, *tensors)

"""Bytes that a rank holds from step to step, measured on what training built."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megasora.training.optimizer import owned_shards
from megasora.training.step import Trainee


@dataclass(frozen=True, kw_only=True)
class State:
    """The tensors and their bytes."""

    weights: int
    gradients: int
    """0 where they come with the backward passes (ZeRO-2 and ZeRO-3)."""
    optimizer: int
    ema: int
    padding: int
    tensors: tuple[Tensor, ...]
    """Everything counted here."""


def state_of(trainee: Trainee, *, zero_stage: int) -> State:
    """What `build_trainee` and `ensure_adam_state` made."""
    shards = list(owned_shards(trainee.optimizer))
    averages = [] if trainee.ema is None else trainee.ema.averages
    parameters = [parameter for chunk in trainee.chunks for parameter in chunk.parameters()]
    own_masters = [shard.master for shard in shards if not _shares(shard.master, parameters)] if zero_stage == 1 else _masters(shards)
    adam = [*own_masters, *(value for shard in shards for name, value in shard.state.items() if name != "step")]
    ema = [average for average in averages]
    if zero_stage > 1:
        return State(weights=0, gradients=0, optimizer=_bytes(adam), ema=_bytes(ema), padding=0, tensors=(*adam, *ema))
    buffers = [buffer for chunk in trainee.wrapped if isinstance(chunk, DistributedDataParallel) for buffer in chunk.buffers]
    weights, gradients = _bytes(parameters), sum(4 * parameter.numel() for parameter in parameters)
    held = [tensor for buffer in buffers for tensor in (buffer.param_data, buffer.grad_data) if tensor is not None]
    return State(
        weights=weights,
        gradients=gradients,
        optimizer=_bytes(adam),
        ema=_bytes(ema),
        padding=_bytes(held) - weights - gradients,
        tensors=(*held, *adam, *ema),
    )


def _masters(shards: Iterable[object]) -> list[Tensor]:
    return [shard.master for shard in shards]  # type: ignore[attr-defined]


def _shares(master: Tensor, parameters: Iterable[Tensor]) -> bool:
    """An fp32 model is its own master."""
    storages = {parameter.untyped_storage()._cdata for parameter in parameters}
    return master.untyped_storage()._cdata in storages


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

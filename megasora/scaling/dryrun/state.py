"""Bytes that a rank holds from step to step, measured on what training built."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

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
    model = {parameter.untyped_storage()._cdata for parameter in parameters} if zero_stage == 1 else set()
    masters = [shard.master for shard in shards if shard.master.untyped_storage()._cdata not in model]  # an fp32 model is its own master
    adam = [*masters, *(value for shard in shards for name, value in shard.state.items() if name != "step")]
    ema = list(averages)
    if zero_stage > 1:
        held = (*adam, *ema, *_sharded_rows(trainee))
        return State(weights=0, gradients=0, optimizer=_bytes(adam), ema=_bytes(ema), padding=0, tensors=held)
    buffers = [buffer for chunk in trainee.wrapped if isinstance(chunk, DistributedDataParallel) for buffer in chunk.buffers]
    weights, gradients = _bytes(parameters), sum(4 * parameter.numel() for parameter in parameters)
    held = tuple(tensor for buffer in buffers for tensor in (buffer.param_data, buffer.grad_data) if tensor is not None)
    return State(
        weights=weights,
        gradients=gradients,
        optimizer=_bytes(adam),
        ema=_bytes(ema),
        padding=_bytes(held) - weights - gradients,
        tensors=(*held, *adam, *ema),
    )


def _sharded_rows(trainee: Trainee) -> list[Tensor]:
    """FSDP2's own buffers of a rank's rows. Where rows are padded and tensors are fake it copies the masters (it compares addresses to see
    whether it must); a real run does not."""
    rows = []
    for chunk in trainee.chunks:
        assert isinstance(chunk, FSDPModule), "ZeRO-2 and ZeRO-3 shard every chunk"
        chunk._get_fsdp_state()._lazy_init()
        for module in chunk.modules():
            group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
            rows += [parameter._sharded_param_data for parameter in group.fsdp_params] if group is not None else []
    return rows


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

"""Adam's moments below fp32, as Transformer Engine's FusedAdam keeps them, and their fp32 values, which checkpoints hold.

bf16 moments are rounded; fp16 ones stand beside one fp32 scale for the rank's run of a parameter, which brings the largest to half the
range of fp16. FusedAdam widens them for a step and narrows them again behind it. A checkpoint holds the widened values: it knows neither
formats nor the runs that scales belong to, so a run may go on in other formats and layouts. Narrowing what was widened gives the same
values again (`set_moments`), so a restart changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, Adam
from torch import Tensor

from megasora.config.errors import UserError
from megasora.config.schema import OptimizerConfig
from megasora.training.owned_shard import OwnedShard

MOMENTS = ("exp_avg", "exp_avg_sq")
_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NEIGHBOURS = 2
"""Roundings between a scale and what is found of it in the values: largest = range x scale, then largest / range, each rounded once."""


def moment_formats(settings: OptimizerConfig) -> dict[str, torch.dtype]:
    """FusedAdam's (and Megatron's) arguments for moments below fp32; none where both are fp32.

    Raises:
        UserError: Megatron-core took another Adam.
    """
    formats = {"exp_avg_dtype": _FORMATS[settings.exp_avg_dtype], "exp_avg_sq_dtype": _FORMATS[settings.exp_avg_sq_dtype]}
    if set(formats.values()) == {torch.float32}:
        return {}
    if USING_PYTORCH_OPTIMIZER or not Adam.__module__.startswith("transformer_engine"):
        raise UserError(
            "optimizer.exp_avg_dtype and exp_avg_sq_dtype below fp32 are kept by Transformer Engine's FusedAdam, and this environment has "
            "another Adam; install Transformer Engine, or use fp32 for both"
        )
    return formats


def start_moments(shard: OwnedShard) -> None:
    """Zeros where the shard has no moments yet."""
    if all(name in shard.state for name in MOMENTS):
        return
    if any(_is_narrow(shard, name) for name in MOMENTS):
        adam: Any = shard.adam
        adam.initialize_state(shard.master, False)
        return
    for name in MOMENTS:
        shard.state.setdefault(name, torch.zeros_like(shard.master))


def moments_of(shards: Sequence[OwnedShard]) -> list[dict[str, Tensor]]:
    """fp32 moments of each shard: the state itself where it is fp32, else a widened copy."""
    return [{name: _widened(shard, name) for name in MOMENTS} for shard in shards]


def set_moments(shards: Sequence[OwnedShard], moments: Sequence[Mapping[str, Tensor]]) -> None:
    """Make the shards' moments these, where they are copies.

    Values that were widened from the same run come out the same to the bit; others (of another layout or format) are rounded.
    """
    for shard, values in zip(shards, moments, strict=True):
        for name in MOMENTS:
            if _is_narrow(shard, name):
                _narrow(shard, name, values[name])


def _is_narrow(shard: OwnedShard, name: str) -> bool:
    return _format_of(shard, name) != torch.float32


def _format_of(shard: OwnedShard, name: str) -> torch.dtype:
    """Only FusedAdam has formats; other Adams keep the master's."""
    formats: dict[str, torch.dtype] = getattr(shard.adam, "name_to_dtype_map", {})
    return formats.get(name, torch.float32)


def _widened(shard: OwnedShard, name: str) -> Tensor:
    if not _is_narrow(shard, name):
        return shard.state[name]
    adam: Any = shard.adam
    values: Tensor = adam.get_unscaled_state(shard.master, name)
    return values


def _narrow(shard: OwnedShard, name: str, values: Tensor) -> None:
    """By FusedAdam's own rule; in fp16 with the neighbouring scale that gives the values again, if one does."""
    adam: Any = shard.adam
    adam.set_scaled_state(shard.master, name, values.clone())  # which scales its argument in place
    if _format_of(shard, name) != torch.float16:
        return
    state, scale = shard.state[name], adam._scales[shard.master][name]
    found = (state.clone(), scale.clone())
    for neighbour in _around(found[1]):
        state.copy_(values * torch.where(neighbour > 0, neighbour.reciprocal(), 0.0))
        scale.copy_(neighbour)
        if torch.equal(_widened(shard, name), values):
            return
    state.copy_(found[0])
    scale.copy_(found[1])


def _around(scale: Tensor) -> list[Tensor]:
    """The scale and its neighbours in fp32, nearest first."""
    found, up, down = [scale.clone()], scale, scale
    for _ in range(_NEIGHBOURS):
        up, down = torch.nextafter(up, torch.full_like(up, torch.inf)), torch.nextafter(down, torch.zeros_like(down))
        found += [up, down]
    return found

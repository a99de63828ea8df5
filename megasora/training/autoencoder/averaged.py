"""The moving average in the place of the weights, for as long as something is measured of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from megasora.training.optimizer import EMA


@contextmanager
def averaged_weights(module: nn.Module, ema: EMA) -> Iterator[None]:
    """Give a module the average's weights, in its own type, and afterwards its own back, to the bit; all ranks do it together.

    Parameters that are not trained have no average, and stay.

    Args:
        module: whole on every rank.
        ema: each rank has runs of it (ZeRO-1), all of them together the whole.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in parameters]
    own = {id(shard.parameter): (shard, average) for shard, average in zip(ema.shards, ema.averages, strict=True)}
    try:
        with torch.no_grad():
            for parameter in parameters:
                whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
                if id(parameter) in own:
                    shard, average = own[id(parameter)]
                    whole[shard.start : shard.stop] = average.view(-1)
                dist.all_reduce(whole)
                parameter.copy_(whole.view_as(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)

"""What an optimizer that shares its work out over ranks says of its part; checkpoints and EMA read nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OwnedShard:
    """The flat run of one local parameter whose optimizer state this rank holds."""

    parameter: Tensor
    """The local parameter (with FSDP2 the DTensor of its rows, whose shape is the local parameter's)."""
    start: int
    stop: int
    """Elements [start, stop) of the flattened parameter."""
    master: Tensor
    """fp32 master weights of the run (for an fp32 model a view of the parameter)."""
    state: dict[str, Tensor]
    """Adam's exp_avg and exp_avg_sq of the run; filled by `ensure_adam_state` or the first step."""
    adam: torch.optim.Optimizer
    """Whose state it is."""
    counts_steps: bool
    """Whether this Adam keeps its step here too, a tensor."""
    dtype: torch.dtype
    """Number format of the weights that the model computes with."""


def counts_per_parameter(adam: torch.optim.Optimizer) -> bool:
    """Whether an Adam keeps its step in each parameter's state (torch's) and not in its groups (Transformer Engine's, apex's)."""
    return isinstance(adam, (torch.optim.Adam, torch.optim.AdamW))

"""Ranks that encode each clip together (`encoders.parallel`): the first decodes, tells the others, and writes; all run the autoencoder."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.data.decoding.contract import Decoded, DecodeError
from megasora.parallel import groups

T = TypeVar("T")


class ClipRanks:
    """This process's place among them; a process that was started alone is the first and last.

    Args:
        group: of all of them; None for one process.
        device: where pixels travel.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, device: torch.device) -> None:
        self.group, self.device = group, device

    @classmethod
    def start(cls, config: RunConfig, *, shares: bool) -> ClipRanks:
        """Join the ranks that torchrun or srun started.

        Args:
            config: the run.
            shares: whether anything is encoded that ranks can share out.

        Raises:
            UserError: there are several and nothing to share out.
        """
        device, ranks = groups.choose_device(config.device), groups.launched_ranks(os.environ)
        if ranks == 1:
            return cls(None, device=device)
        if not shares:
            raise UserError(
                f"{ranks} ranks were started, and only the autoencoder's work on a clip can be shared out (--store text has none, "
                "--encoders.parallel none does not share it); start one process, or several with --shard i/n each"
            )
        groups.start_world(device, timeout_minutes=config.parallel.timeout_minutes)
        return cls(dist.group.WORLD, device=device)

    @property
    def leads(self) -> bool:
        """Whether this rank decodes and writes."""
        return self.group is None or self.group.rank() == 0

    def agreed(self, look: Callable[[], T]) -> T:
        """What the first rank finds, on all ranks."""
        if self.group is None:
            return look()
        found: list[Any] = [look() if self.leads else None]
        dist.broadcast_object_list(found, src=dist.get_global_rank(self.group, 0), group=self.group)
        result: T = found[0]
        return result

    def told(self, decoded: Decoded | None) -> Decoded | None:
        """What the first rank decoded, on all ranks; pixels are on the device of those.

        Args:
            decoded: pixels uint8 [3, T, H, W] or why there are none, on the first rank; None on the others.
        """
        if self.group is None:
            return decoded
        shape = self.agreed(lambda: list(decoded.shape) if isinstance(decoded, Tensor) else str(decoded))
        if isinstance(shape, str):
            return decoded if self.leads else DecodeError(shape)
        pixels = (
            decoded.to(self.device).contiguous()
            if isinstance(decoded, Tensor)
            else torch.empty(shape, dtype=torch.uint8, device=self.device)
        )
        dist.broadcast(pixels, src=dist.get_global_rank(self.group, 0), group=self.group)
        return pixels

"""What rank 0 does for all ranks: its refusal ends all alike, and none waits for a rank that has ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megasora.config.errors import UserError
from megasora.config.io import save_yaml

T = TypeVar("T")


def on_rank_0(act: Callable[[], T]) -> T | None:
    """What rank 0 gets by it; None on the others. All ranks call it together.

    Raises:
        UserError: rank 0 was refused; the same on every rank.
    """
    got, refused = None, [""]
    if dist.get_rank() == 0:
        try:
            got = act()
        except UserError as error:
            refused = [str(error)]
    dist.broadcast_object_list(refused, src=0)
    if refused[0]:
        raise UserError(refused[0])
    return got


def make_run_dir(run_dir: Path) -> None:
    """Make a run's folder. All ranks call it together.

    Raises:
        UserError: it cannot be made; the same on every rank.
    """
    on_rank_0(lambda: _written(run_dir, lambda: run_dir.mkdir(parents=True, exist_ok=True)))


def save_config(config: object, run_dir: Path) -> None:
    """Keep a run's settings in its folder. All ranks call it together.

    Raises:
        UserError: they cannot be written; the same on every rank.
    """
    on_rank_0(lambda: _written(run_dir, lambda: save_yaml(config, run_dir / "config.yaml")))


def _written(run_dir: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written: {error.strerror or error}; mend it or choose another --run_dir") from error

"""A run's folder and its settings there, which rank 0 writes for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megasora.config.errors import UserError
from megasora.config.io import save_yaml
from megasora.parallel.agreement import on_rank_0


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

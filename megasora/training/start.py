"""What a fresh run's weights start from: nothing, given weights, or the newest complete checkpoint of an earlier run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megasora.checkpoint import manifests, store
from megasora.checkpoint.source import Select, WeightSource, open_source
from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.training.new_ends import with_new_ends


@dataclass(frozen=True, kw_only=True)
class Start:
    """Weights to start from."""

    path: str
    select: Select
    notes: tuple[str, ...]
    """What differs harmlessly from the run's model, and where the weights come from another stage than the recipe names."""

    def open(self, config: RunConfig) -> WeightSource:
        """The weights, to be read; with new ends where the run's settings ask for them."""
        source = open_source(Path(self.path), axes_dim=config.model.axes_dim, select=self.select)
        return with_new_ends(source, model=config.model, seed=config.init.seed) if _of_other_ends(source, config) else source


def find_start(config: RunConfig, *, root: Path) -> Start | None:
    """What a run starts from; None for random weights, and for a run that goes on from its own checkpoints. All ranks call it together.

    Args:
        config: the run.
        root: folder of its own checkpoints.

    Raises:
        UserError: there are no such weights, or they are of another model; the same on every rank.
    """
    found: list[Start | str | None] = [None]
    if dist.get_rank() == 0:  # the earlier run may still be writing: one rank decides which checkpoint
        try:
            found = [_find(config, root)]
        except UserError as error:
            found = [str(error)]
    dist.broadcast_object_list(found, src=0)
    (start,) = found
    if isinstance(start, str):
        raise UserError(start)
    return start


def _find(config: RunConfig, root: Path) -> Start | None:
    init = config.init
    if store.complete_checkpoints(root):
        return None
    if init.weights is not None:
        return _checked(Start(path=init.weights, select="model", notes=()), config)
    if init.run is None:
        return None
    folder = Path(init.run)
    entries = store.complete_checkpoints(folder / "checkpoints")
    if not entries:
        if manifests.problem_with(folder) is None:
            raise UserError(f"init.run {folder} is a checkpoint, not the folder of a run: use --init.weights {folder}")
        what = "has no complete checkpoint in checkpoints/" if folder.is_dir() else "is no folder"
        raise UserError(f"init.run {folder} {what}; give the run_dir of a run that has saved one, or --init.weights PATH")
    path = entries[-1].path
    state = store.read_manifest(path)["state"]
    has_ema = float(state["ema_decay"]) > 0
    if init.run_weights == "ema" and not has_ema:
        raise UserError(f"init.run_weights is ema, and {path} holds none; use --init.run_weights model")
    select: Select = "ema" if has_ema and init.run_weights != "model" else "model"
    notes = (
        () if init.follows in (None, state["recipe"]) else (f"{config.recipe} follows {init.follows}, this is a run of {state['recipe']}",)
    )
    return _checked(Start(path=str(path), select=select, notes=notes), config)


def _checked(start: Start, config: RunConfig) -> Start:
    notes = (*start.notes, *start.open(config).fits(config.model))
    given = open_source(Path(start.path), axes_dim=config.model.axes_dim, select=start.select)
    if _of_other_ends(given, config):
        had, has = given.model.in_channels, config.model.in_channels
        notes = (*notes, f"img_in, cond_in and final_layer.linear start anew: these weights have {had} input channels, this model {has}")
    return Start(path=start.path, select=start.select, notes=notes)


def _of_other_ends(source: WeightSource, config: RunConfig) -> bool:
    return config.init.ends == "new_if_other" and source.model.in_channels != config.model.in_channels

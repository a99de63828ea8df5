"""What an autoencoder's fresh run starts from: nothing, a folder, or the newest complete checkpoint of an earlier run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from megasora.checkpoint import store
from megasora.checkpoint.autoencoder_checkpoint import open_parameters
from megasora.checkpoint.source import Select
from megasora.checkpoint.tensors import as_torch
from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AutoencoderStart:
    """Where a run's weights come from."""

    fresh: bool
    """Whether there is no checkpoint of its own to go on from."""
    checkpoint: str | None = None
    """Of the earlier run."""
    select: Select = "model"
    notes: tuple[str, ...] = ()


def find_autoencoder_start(config: AutoencoderRunConfig, *, root: Path) -> AutoencoderStart:
    """All ranks call it together; rank 0 decides.

    Args:
        config: the run.
        root: folder of its own checkpoints.

    Raises:
        UserError: init.run has no checkpoint of an autoencoder, or not the weights that were asked for; the same on every rank.
    """
    found: list[AutoencoderStart | str | None] = [None]
    if dist.get_rank() == 0:
        try:
            found = [_find(config, root)]
        except UserError as error:
            found = [str(error)]
    dist.broadcast_object_list(found, src=0)
    (start,) = found
    if not isinstance(start, AutoencoderStart):
        raise UserError(str(start))
    return start


def _find(config: AutoencoderRunConfig, root: Path) -> AutoencoderStart:
    init = config.init
    if store.complete_checkpoints(root):
        return AutoencoderStart(fresh=False)
    if init.run is None:
        named = f"{config.recipe} follows {init.follows}: --init.run FOLDER starts from that run's weights"
        return AutoencoderStart(fresh=True, notes=(named,) if init.follows and init.weights is None else ())
    folder = Path(init.run)
    entries = store.complete_checkpoints(folder / "checkpoints")
    if not entries:
        what = "has no complete checkpoint in checkpoints/" if folder.is_dir() else "is no folder"
        raise UserError(f"init.run {folder} {what}; give the run_dir of a run of megasora train-ae that has saved one")
    path = entries[-1].path
    state = store.read_manifest(path)["state"]
    if state.get("kind") != "autoencoder":
        raise UserError(f"init.run {folder} is a run of {state['recipe']}, not of an autoencoder; give one of megasora train-ae")
    has_ema = float(state["ema_decay"]) > 0
    if init.run_weights == "ema" and not has_ema:
        raise UserError(f"init.run_weights is ema, and {path} holds none; use --init.run_weights model")
    select: Select = "ema" if has_ema and init.run_weights != "model" else "master"
    other = init.follows not in (None, state["recipe"])
    notes = (f"{config.recipe} follows {init.follows}, this is a run of {state['recipe']}",) if other else ()
    return AutoencoderStart(fresh=True, checkpoint=str(path), select=select, notes=notes)


def fill_from_run(module: nn.Module, start: AutoencoderStart) -> None:
    """Give a module in fp32 the weights of the earlier run.

    Raises:
        UserError: they are of an autoencoder of other sizes.
    """
    assert start.checkpoint is not None
    _, reader = open_parameters(Path(start.checkpoint), select=start.select)
    state: dict[str, Tensor] = module.state_dict()
    wrong = [name for name in {**state, **reader.infos} if name not in state or name not in reader.infos]
    wrong += [name for name, tensor in state.items() if name in reader.infos and reader.infos[name].shape != tuple(tensor.shape)]
    if wrong:
        raise UserError(f"init.run {start.checkpoint} is of other sizes, the first tensor {wrong[0]}; change --autoencoder.*")
    module.load_state_dict({name: as_torch(reader.rows(name), reader.infos[name]).float() for name in state})

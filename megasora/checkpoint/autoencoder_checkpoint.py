"""The autoencoder's weights in a checkpoint of `megasora train-ae`: its parameters, their masters or their moving average, by plain names.

Masters and averages lie there flat, each parameter one run over all ranks; here they have their parameters' shapes again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megasora.checkpoint import manifests
from megasora.checkpoint.megatron_io import MegatronReader
from megasora.checkpoint.source import Select
from megasora.checkpoint.tensors import Rows, TensorInfo
from megasora.config.errors import UserError

KIND = "autoencoder"


class ShapedReader:
    """Flat tensors read in the shapes of others of the same names.

    Args:
        flat: where they lie.
        shaped: the others.
        frozen: where those lie that were not trained, the first that has one: flat masters, or the others themselves. Empty: all were.
    """

    def __init__(self, flat: MegatronReader, shaped: MegatronReader, *, frozen: tuple[MegatronReader, ...] = ()) -> None:
        self.flat, self.shaped, self.frozen = flat, shaped, frozen

    @cached_property
    def _readers(self) -> dict[str, MegatronReader]:
        """Where each tensor lies."""
        places = (self.flat, *self.frozen)
        found = {key: next((reader for reader in places if key in reader.infos), None) for key in self.shaped.infos}
        return {key: reader for key, reader in found.items() if reader is not None}

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor."""
        return {key: replace(reader.infos[key], shape=self.shaped.infos[key].shape) for key, reader in self._readers.items()}

    def rows(self, key: str) -> Rows:
        """A tensor's bytes."""
        info = self.infos[key]
        return self._readers[key].rows(key).reshape(info.num_rows, info.row_bytes)

    def release(self, key: str) -> None:
        """Let the tensor's pages go."""
        self._readers[key].release(key)


def open_parameters(path: Path, *, select: Select = "model") -> tuple[dict[str, Any], ShapedReader]:
    """(the manifest's state, a reader of the weights).

    Args:
        path: of the checkpoint.
        select: master means the parameters themselves where a run keeps no others.

    Raises:
        UserError: it is no checkpoint of an autoencoder's run, or holds no such weights.
    """
    facts = manifests.read(path)
    state = facts.get("state", {})
    if facts["format"] != manifests.TRAINING or state.get("kind") != KIND:
        raise UserError(f"{path} is no checkpoint of megasora train-ae; give one, or the weights of an autoencoder")
    if select == "ema" and not float(state["ema_decay"]) > 0:
        raise UserError(f"{path} holds no EMA; use --select model")
    part = "model" if select == "master" and state["dtype"] == "fp32" else select
    model = MegatronReader(path, prefix="model.")
    flat = model if part == "model" else MegatronReader(path, prefix=f"{part}.")
    frozen: tuple[MegatronReader, ...] = ()
    if (state.get("distillation") or {}).get("trained") == "encoder":
        frozen = (model,) if state["dtype"] == "fp32" else (MegatronReader(path, prefix="master."), model)
    return state, ShapedReader(flat, model, frozen=frozen)

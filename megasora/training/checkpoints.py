"""A run's checkpoints: what goes in, and whether what lies there is of this run."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasora.checkpoint import store
from megasora.config.errors import UserError
from megasora.config.io import to_dict
from megasora.config.schema import RunConfig
from megasora.data.plan import SamplerState
from megasora.models.mmdit.sharded_state import model_tensors
from megasora.parallel.groups import ParallelContext
from megasora.parallel.row_shards import reshard
from megasora.training.guard import Guard
from megasora.training.optimizer import ensure_adam_state, refresh_masters
from megasora.training.state import optimizer_tensors
from megasora.training.step import Trainee

DECIDES_SAMPLES = ("seed", "global_tokens", "data_sha256")
"""Facts of a run without which a position of its sampler means nothing."""


class Checkpoints:
    """Saves and resumes a trainee.

    Args:
        root: folder of the checkpoints.
        config: the run.
        context: this rank's groups.
        data_sha256: of the manifest that is trained on.
    """

    def __init__(self, root: Path, *, config: RunConfig, context: ParallelContext, data_sha256: str) -> None:
        self.root, self.config, self.context, self.data_sha256 = root, config, context, data_sha256

    @property
    def data_key(self) -> str:
        """Eight digits for the data, the budget and the seed: positions of the sampler mean something under this key only."""
        facts = {name: value for name, value in self._same_in_a_run().items() if name in DECIDES_SAMPLES}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]

    def save(self, trainee: Trainee, *, guard: Guard) -> dict[str, Any]:
        """Write a checkpoint and prune old ones; returns the event. All ranks call it together."""
        started = time.perf_counter()
        path = store.save(self.root, step=trainee.step, tensors=self._tensors(trainee), state=self._state(trainee, guard))
        settings = self.config.checkpoint
        if self.context.rank == 0:
            store.prune(self.root, keep=settings.keep, keep_every_steps=settings.keep_every_steps)
        return {"event": "checkpoint", "path": path.name, "seconds": round(time.perf_counter() - started, 3)}

    def resume(self, trainee: Trainee, *, guard: Guard) -> dict[str, Any] | None:
        """Load the newest complete checkpoint, if any; all ranks agree on which. Returns the event.

        Raises:
            UserError: it is of another run.
        """
        choice: list[Any] = [None]
        if self.context.rank == 0:
            entries = store.complete_checkpoints(self.root)
            choice = [(str(entries[-1].path), store.read_manifest(entries[-1].path)) if entries else None]
        dist.broadcast_object_list(choice, src=0)
        if choice[0] is None:
            return None
        folder, facts = Path(choice[0][0]), choice[0][1]
        changed = self._changed_data(facts["state"], folder)
        self._load(trainee, folder, facts)
        if "guard" in facts["state"]:
            guard.restore(facts["state"]["guard"])
        data = self._begin_elsewhere(trainee, guard, changed) if changed else {}
        init = self.config.init
        given = "weights" if init.weights else "run" if init.run else None
        ignored = f"; --init.{given} is ignored" if given else ""
        return {"event": "restart", "from": folder.name, "step": trainee.step, "note": f"resumed{ignored}", **data}

    def _begin_elsewhere(self, trainee: Trainee, guard: Guard, changed: list[str]) -> dict[str, Any]:
        """Move the sampler of a run whose data have changed; what the event says of it."""
        at = trainee.sampler
        next_epoch = at.epoch + (at.consumed > 0)
        trainee.sampler = SamplerState(epoch=next_epoch if self.config.resume_data == "epoch" else 0)
        guard.left_out.clear()  # positions in data that are no more
        return {"data": f"epoch {trainee.sampler.epoch} begins, for {' and '.join(changed)}"}

    def _load(self, trainee: Trainee, folder: Path, facts: dict[str, Any]) -> None:
        ensure_adam_state(trainee.optimizer, step=facts["step"])
        store.load(folder, self._tensors(trainee))
        if trainee.megatron_config.params_dtype == torch.float32:
            refresh_masters(trainee.optimizer)
        ensure_adam_state(trainee.optimizer, step=facts["step"])
        trainee.step = facts["step"]
        trainee.sampler = SamplerState(**facts["state"]["sampler"])
        trainee.samples_seen = facts["state"]["samples_seen"]

    def _tensors(self, trainee: Trainee) -> dict[str, Any]:
        reshard(trainee.chunks)
        model, context = self.config.model, self.context
        return {
            **model_tensors(trainee.chunks, model=model, context=context),
            **optimizer_tensors(trainee.chunks, trainee.optimizer, trainee.ema, model=model, context=context),
        }

    def _state(self, trainee: Trainee, guard: Guard) -> dict[str, Any]:
        """What the manifest keeps beside the tensors."""
        return {
            "recipe": self.config.recipe,
            "parallel": to_dict(self.config.parallel),
            "sampler": asdict(trainee.sampler),
            "samples_seen": trainee.samples_seen,
            "guard": guard.state(),
            "ema_decay": self.config.optimizer.ema_decay,
            **self._same_in_a_run(),
        }

    def _same_in_a_run(self) -> dict[str, Any]:
        config = self.config
        return {
            "model": to_dict(config.model),
            "dtype": config.precision.dtype,
            "seed": config.train.seed,
            "global_tokens": config.data.global_tokens,
            "data_sha256": self.data_sha256,
        }

    def _changed_data(self, state: dict[str, Any], folder: Path) -> list[str]:
        """What decides which samples come, and is another than in the checkpoint; empty when the run goes on exactly.

        Raises:
            UserError: the checkpoint is of another model or format, or of other data and the run does not say how to go on.
        """
        changed = []
        for name, value in self._same_in_a_run().items():
            if state[name] == value:
                continue
            was, now = _first_difference(state[name], value)
            moves = name in DECIDES_SAMPLES
            if not moves or self.config.resume_data == "exact":
                choice = "--resume_data epoch (or restart) to go on with the new data, " if moves else ""
                raise UserError(
                    f"checkpoint {folder} has another {name} ({was}) than this run ({now}); "
                    f"use the same settings, {choice}or a new --run_dir with --init.weights {folder}"
                )
            changed.append(f"another {name}")
        if (state["ema_decay"] > 0) != (self.config.optimizer.ema_decay > 0):
            has = "has" if state["ema_decay"] > 0 else "lacks"
            raise UserError(f"checkpoint {folder} {has} an EMA; keep optimizer.ema_decay as it was")
        return changed


def _first_difference(was: Any, now: Any) -> tuple[str, str]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in now:
            if was.get(key) != now[key]:
                return f"{key}={was.get(key)}", f"{key}={now[key]}"
    return str(was), str(now)

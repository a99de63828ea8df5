"""What a checkpoint of an autoencoder's run holds: both networks, their optimizers and the moving average, in one transaction.

Keys: `<part>.<name>` with part in model, master, exp_avg, exp_avg_sq, ema of the autoencoder, and
`discriminator_<part>.<name>`, `projector_<part>.<name>` of distillation's projector. Parameters
have their own shapes; the others are flat, for a rank's share is a run of the flattened parameter: they lie where they are, in any number
of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megasora.checkpoint.lease import Lease
from megasora.checkpoint.newest import Found
from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.data.plan import SamplerState
from megasora.models.mmdit.sharded_state import sharded
from megasora.parallel.groups import ParallelContext
from megasora.training.autoencoder.step import AutoencoderTrainee, Learning
from megasora.training.checkpoints import RunCheckpoints
from megasora.training.optimizer import ensure_adam_state, owned_shards, refresh_masters

KIND = "autoencoder"
"""Of the manifest's state."""


class AutoencoderCheckpoints(RunCheckpoints[AutoencoderTrainee]):
    """Those of an autoencoder's run.

    Args:
        kept: what a run keeps of its networks: `model`, config.json of the autoencoder, and `distillation` (`teaching.kept_of`).
    """

    def __init__(
        self,
        root: Path,
        *,
        lease: Lease | None,
        config: AutoencoderRunConfig,
        context: ParallelContext,
        data_sha256: str,
        kept: dict[str, Any],
    ) -> None:
        super().__init__(root, lease=lease, config=config, context=context, data_sha256=data_sha256)
        self.run, self.kept = config, kept

    def load(self, trainee: AutoencoderTrainee, found: Found) -> None:
        """See `RunCheckpoints.load`."""
        facts = found.manifest
        steps = facts["state"]["optimizer_steps"]
        for learner, done in zip(trainee.learners, steps, strict=True):
            ensure_adam_state(learner.optimizer, step=done)
        self.read(trainee, found)
        for learner, done in zip(trainee.learners, steps, strict=True):
            if trainee.dtype == torch.float32:
                refresh_masters(learner.optimizer)
            ensure_adam_state(learner.optimizer, step=done)
            learner.steps = done
        trainee.step = facts["step"]
        trainee.sampler = SamplerState(**facts["state"]["sampler"])
        trainee.samples_seen = facts["state"]["samples_seen"]

    def tensors(self, trainee: AutoencoderTrainee) -> dict[str, Any]:
        """See `RunCheckpoints.tensors`."""
        averages = trainee.ema.averages if trainee.ema is not None else ()
        found = dict(learning_tensors(trainee.main, prefix="", averages=averages, context=self.context))
        if trainee.adversary is not None:
            found |= dict(learning_tensors(trainee.adversary, prefix="discriminator_", averages=(), context=self.context))
        if trainee.projector is not None:
            found |= dict(learning_tensors(trainee.projector, prefix="projector_", averages=(), context=self.context))
        return found

    def own_state(self, trainee: AutoencoderTrainee) -> dict[str, Any]:
        """See `RunCheckpoints.own_state`."""
        return {"optimizer_steps": [learner.steps for learner in trainee.learners]}

    def same_in_a_run(self) -> dict[str, Any]:
        """See `RunCheckpoints.same_in_a_run`."""
        config = self.run
        adversary = config.discriminator
        sizes = {"width": adversary.width, "num_layers": adversary.num_layers, "norm": adversary.norm}
        return {
            "kind": KIND,
            **self.kept,
            "discriminator": sizes if config.has_discriminator else None,
            "dtype": config.precision.dtype,
            "seed": config.train.seed,
            "batch_size": config.data.batch_size,
            "image_share": config.data.image_share,
            "data_sha256": self.data_sha256,
        }


def learning_tensors(
    learner: Learning, *, prefix: str, averages: Sequence[Tensor], context: ParallelContext
) -> Iterator[tuple[str, ShardedTensor]]:
    """(name, rectangle) of a module's parameters, of this rank's share of its masters, moments and moving average, and of the masters of
    what is not trained."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in learner.module.named_parameters()}
    copy = context.pg_collection.dp_cp.rank()
    for parameter, name in names.items():
        shape = tuple(parameter.shape)
        key = f"{prefix}model.{name}"
        yield key, sharded(key, parameter.data, shape, (0,) * len(shape), (0, 0, copy))
    for name, value in learner.frozen.items():
        key = f"{prefix}master.{name}"
        yield f"{key}@0", sharded(key, value.view(-1), (value.numel(),), (0,), (0, 0, copy))
    for number, shard in enumerate(owned_shards(learner.optimizer)):
        buffers = {"exp_avg": shard.state["exp_avg"], "exp_avg_sq": shard.state["exp_avg_sq"]}
        if shard.master.dtype != shard.dtype:
            buffers["master"] = shard.master.data
        if averages:
            buffers["ema"] = averages[number]
        whole = (shard.parameter.numel(),)
        for part, flat in buffers.items():
            key = f"{prefix}{part}.{names[shard.parameter]}"
            yield f"{key}@{shard.start}", sharded(key, flat.view(-1), whole, (shard.start,), (0, 0, 0))

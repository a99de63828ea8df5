"""Adam on Megatron's distributed optimizer (ZeRO-1), its schedule, and the moving average of the fp32 weights.

ZeRO-2 and ZeRO-3 are in `fully_sharded`; the functions here take either optimizer.

Everything that reaches into the distributed optimizer's maps is here: which flat run of which parameter this rank owns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer import TransformerConfig
from torch import nn

from megasora.config.errors import UserError
from megasora.config.schema import OptimizerConfig, ParallelConfig
from megasora.models.mmdit.model import MMDiT
from megasora.parallel.groups import ParallelContext
from megasora.training.fully_sharded import FullyShardedAdam, shard_fully
from megasora.training.moments import moment_formats, start_moments
from megasora.training.owned_shard import OwnedShard, counts_per_parameter

TrainingOptimizer: TypeAlias = MegatronOptimizer | FullyShardedAdam
"""ZeRO-1, or ZeRO-2 and ZeRO-3."""


def prepare_training(
    chunks: Sequence[MMDiT],
    *,
    config: TransformerConfig,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    context: ParallelContext,
) -> tuple[list[nn.Module], TrainingOptimizer]:
    """(the chunks as the schedules take them, their optimizer) for the ZeRO stage of the run; sets the gradient finaliser."""
    if parallel.zero_stage == 1:
        wrapped = wrap_for_training(chunks, config=config, parallel=parallel, context=context)
        return list(wrapped), build_optimizer(wrapped, optimizer=optimizer, dtype=config.params_dtype)
    shard_fully(chunks, config=config, zero_stage=parallel.zero_stage, context=context)
    return list(chunks), FullyShardedAdam(chunks, config=config, optimizer=optimizer, context=context)


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Which of the data-parallel messages run beside the computation."""

    grad_reduce: bool
    param_gather: bool


def overlap_of(parallel: ParallelConfig, *, on_cuda: bool, replicas: int) -> Overlap:
    """The settings, or what they are by themselves.

    Megatron gathers parameters beside the forward pass only where it reduces gradients beside the backward pass, so asking for the former
    turns the latter on.

    Args:
        parallel: the run's; an explicit value wins.
        on_cuda: gloo's messages take the cores that compute: on the CPU nothing overlaps by itself.
        replicas: ranks that hold the same parameters, DP x CP.
    """
    by_itself = on_cuda and replicas > 1
    reduce, gather = parallel.overlap_grad_reduce, parallel.overlap_param_gather
    grad_reduce = (by_itself or gather is True) if reduce is None else reduce
    return Overlap(grad_reduce=grad_reduce, param_gather=(by_itself and grad_reduce) if gather is None else gather)


class LoneReplica(DistributedDataParallel):
    """Megatron's DDP over a group of one rank: its shard is the whole buffer, so there is nothing to reduce or to gather.

    Megatron runs its collectives there too; NCCL does nothing then, gloo copies the gradients twice.
    """

    def start_grad_sync(self, *unused: object) -> None:
        """Nothing: this rank's gradients are the sums."""

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Nothing."""

    def start_param_sync(self, *unused: object, force_sync: bool = False, force_dispatch: bool = False) -> None:
        """Nothing: the optimizer wrote every parameter."""


def wrap_for_training(
    chunks: Sequence[nn.Module], *, config: TransformerConfig, parallel: ParallelConfig, context: ParallelContext
) -> list[DistributedDataParallel]:
    """Wrap the chunks in Megatron's DDP with fp32 gradient reduction and hook up the gradient finaliser."""
    topology = context.topology
    overlap = overlap_of(parallel, on_cuda=context.device.type == "cuda", replicas=topology.dp * topology.cp)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap.grad_reduce,
        overlap_param_gather=overlap.param_gather,
    )
    overlaps = overlap.grad_reduce or overlap.param_gather  # they work by hooks on the buckets, past these methods
    wrapper = LoneReplica if context.pg_collection.dp_cp.size() == 1 and not overlaps else DistributedDataParallel
    wrapped = [
        wrapper(config, ddp_config, chunk, disable_bucketing=number > 0, pg_collection=context.pg_collection)
        for number, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    if overlap.grad_reduce and len(wrapped) > 1:
        config.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]
    if overlap.param_gather and len(wrapped) > 1:
        config.param_sync_func = [chunk.start_param_sync for chunk in wrapped]
    return wrapped


def sync_parameters(wrapped: Sequence[nn.Module]) -> None:
    """Finish the optimizer's parameter gather: with overlap_param_gather it waits for the next training forward, and whoever looks at the
    parameters before (evaluation, checkpoint) would see the old ones."""
    for chunk in wrapped:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def build_optimizer(wrapped: Sequence[DistributedDataParallel], *, optimizer: OptimizerConfig, dtype: torch.dtype) -> MegatronOptimizer:
    """Megatron's distributed Adam over the wrapped chunks; biases and norm scales are not decayed.

    Raises:
        UserError: the parameters are on the CPU and Megatron-core took an Adam that runs on GPUs only, or moments need another's formats.
    """
    on_cpu = any(not parameter.is_cuda for chunk in wrapped for parameter in chunk.parameters())
    if on_cpu and not USING_PYTORCH_OPTIMIZER:
        raise UserError(
            "Megatron-core takes the FusedAdam of Transformer Engine or apex where one is installed, and that runs on GPUs only; "
            "train with --device cuda, or on the CPU in an environment without the two"
        )
    formats = moment_formats(optimizer)
    built = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            clip_grad=optimizer.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=wrapped[0].ddp_config.overlap_param_gather,
            use_precision_aware_optimizer=bool(formats),
            fp8_recipe="tensorwise" if formats else None,  # with which Megatron keeps the fp32 masters, not FusedAdam; no FP8 is involved
            **formats,
        ),
        list(wrapped),
        use_gloo_process_groups=False,  # they gather checkpoints in host memory; ours are written as rectangles, in place
    )
    for group in built.param_groups:  # Megatron leaves the factor of a group (0 for what has one dim) to its scheduler, which we do not use
        group["weight_decay"] = optimizer.weight_decay * group["wd_mult"]
    for inner in _distributed(built):
        _fuse_on_cpu(inner.optimizer)
    return built


def _fuse_on_cpu(inner: torch.optim.Optimizer | None) -> None:
    """Let torch's Adam pass over a CPU tensor once; its default there is ten operations on each, and Megatron has no setting for it."""
    if inner is None or not counts_per_parameter(inner):
        return
    for group in inner.param_groups:
        if all(parameter.device.type == "cpu" for parameter in group["params"]):
            group["foreach"], group["fused"] = False, True


def learning_rate(step: int, *, config: OptimizerConfig) -> float:
    """Rate of the step with this 0-based number: linear warm-up, then the last milestone reached."""
    rate = config.lr
    for milestone, value in config.lr_milestones:
        if step >= milestone:
            rate = value
    return rate * min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else rate


def zero_gradients(wrapped: Sequence[nn.Module], optimizer: TrainingOptimizer) -> None:
    """Forget the gradients of the step before."""
    for chunk in wrapped:
        if isinstance(chunk, DistributedDataParallel):
            chunk.zero_grad_buffer()
    optimizer.zero_grad()


def update_weights(optimizer: TrainingOptimizer, *, accept: Callable[[float], bool]) -> tuple[float, bool]:
    """Clip the gradients by their norm over all ranks and step, unless the norm is refused; then only gradients have changed.

    What Megatron's optimizers do in `step` (megatron/core/optimizer/optimizer.py), with a look at the norm between.

    Returns:
        (gradient norm before clipping, whether the weights changed), the same on every rank.
    """
    if isinstance(optimizer, FullyShardedAdam):
        return optimizer.step(accept=accept)
    norm = ready_gradients(optimizer)
    if not accept(norm):
        return norm, False
    apply_gradients(optimizer, norm=norm)
    return norm, True


def ready_gradients(optimizer: MegatronOptimizer) -> float:
    """Bring the summed gradients to the master shards; their norm over all ranks.

    No weight changes: of several optimizers each can be asked before any of them steps.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def apply_gradients(optimizer: MegatronOptimizer, *, norm: float) -> None:
    """Clip what `ready_gradients` found of this norm, and step."""
    for inner in _distributed(optimizer):
        parameters, limit = inner.get_parameters(), inner.config.clip_grad
        if parameters and limit > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=limit, total_norm=norm)
    optimizer.step_with_ready_grads()


def owned_shards(optimizer: TrainingOptimizer) -> Iterator[OwnedShard]:
    """This rank's shards, in the order of the gradient buffers or parameters (the same at every call)."""
    if isinstance(optimizer, FullyShardedAdam):
        yield from optimizer.owned_shards()
        return
    for inner in _distributed(optimizer):
        for buffer in inner.buffers:
            for parameter in buffer.param_index_map:
                if parameter not in inner.model_param_group_index_map:
                    continue
                group, order = inner.model_param_group_index_map[parameter]
                master = inner.optimizer.param_groups[group]["params"][order]
                run = inner._get_model_param_range_map(parameter)["param"]
                yield OwnedShard(
                    parameter=parameter,
                    start=run.start,
                    stop=run.end,
                    master=master,
                    state=inner.optimizer.state[master],
                    adam=inner.optimizer,
                    counts_steps=counts_per_parameter(inner.optimizer),
                    dtype=parameter.dtype,
                )


def ensure_adam_state(optimizer: TrainingOptimizer, *, step: int) -> None:
    """Give every shard its own Adam state at `step`.

    torch's Adam counts in a tensor for each parameter (after a load they must not share one); Transformer Engine's and apex's FusedAdam,
    which Megatron-core takes where they are installed, count in their parameter groups.
    """
    for adam in _adams(optimizer):
        if not counts_per_parameter(adam):
            for group in adam.param_groups:
                group["step"] = step
    for shard in owned_shards(optimizer):
        start_moments(shard)
        if shard.counts_steps:
            shard.state["step"] = torch.tensor(float(step))


def refresh_masters(optimizer: TrainingOptimizer) -> None:
    """Copy freshly written parameters into the master shards (after initialising or importing weights)."""
    if isinstance(optimizer, FullyShardedAdam):
        optimizer.refresh_masters()
        return
    for shard in owned_shards(optimizer):
        shard.master.data.copy_(shard.parameter.detach().view(-1)[shard.start : shard.stop])


def _adams(optimizer: TrainingOptimizer) -> Iterator[torch.optim.Optimizer]:
    if isinstance(optimizer, FullyShardedAdam):
        yield optimizer.adam
        return
    for inner in _distributed(optimizer):
        yield inner.optimizer


def _distributed(optimizer: MegatronOptimizer) -> Iterator[DistributedOptimizer]:
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        assert isinstance(inner, DistributedOptimizer), f"Megatron's optimizer is ZeRO-1's, got {type(inner).__name__}"
        yield inner


class EMA:
    """Exponential moving average of the fp32 master shards; it lives beside the optimizer, sharded like it.

    Args:
        optimizer: whose masters are averaged.
        decay: weight of the past per step.
    """

    def __init__(self, optimizer: TrainingOptimizer, *, decay: float) -> None:
        self.decay = decay
        self.shards = list(owned_shards(optimizer))
        self.averages = [shard.master.detach().float().clone() for shard in self.shards]

    @torch.no_grad()
    def update(self) -> None:
        """Move every average toward its weights by 1 - decay."""
        if self.averages:
            torch._foreach_lerp_(self.averages, [shard.master.detach() for shard in self.shards], 1 - self.decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the current weights."""
        for average, shard in zip(self.averages, self.shards, strict=True):
            average.copy_(shard.master.detach())

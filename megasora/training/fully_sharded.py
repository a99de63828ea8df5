"""ZeRO-2 and ZeRO-3 on torch's FSDP2: gradients (and parameters) are sharded over DP x CP by rows, next to TP and PP.

The sharded parameters are the master weights, in fp32; FSDP2 gathers them block by block in the model's number format and reduce-scatters
gradients in fp32 after every micro-batch. Everything after that (sums over TP, the division by the number of samples, the norm, Adam) works
on a rank's rows. Megatron's schedules see the chunks themselves: no DDP, no gradient buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, Adam
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megasora.config.schema import OptimizerConfig
from megasora.models.mmdit.model import MMDiT
from megasora.parallel.groups import ParallelContext
from megasora.parallel.row_shards import held_rows, reshard
from megasora.training.moments import moment_formats
from megasora.training.owned_shard import OwnedShard, counts_per_parameter

_MARKS = ("tensor_model_parallel", "sequence_parallel")
"""Megatron's attributes of parameters that decide how gradients and norms are summed over TP; FSDP2 makes new parameters without them."""


def master_dtype(config: TransformerConfig) -> torch.dtype:
    """Number format of the sharded parameters: fp32 under bf16, else the model's own (fp64 serves the exact parity tests)."""
    dtype: torch.dtype = config.params_dtype
    return torch.float32 if dtype == torch.bfloat16 else dtype


def shard_fully(chunks: Sequence[MMDiT], *, config: TransformerConfig, zero_stage: int, context: ParallelContext) -> None:
    """Shard every block, then the rest of each chunk, in place.

    ZeRO-3 gathers a block for its forward and again for its backward pass, every micro-batch. ZeRO-2 gathers it once a step and keeps it
    until the optimizer has changed the weights (`FullyShardedAdam.step` drops it).

    Args:
        chunks: this rank's chunks, on their device.
        config: Megatron's settings of the chunks.
        zero_stage: 2 or 3.
        context: whose DP x CP group shares the parameters.
    """
    device = next(chunks[0].parameters()).device
    mesh = DeviceMesh.from_group(context.pg_collection.dp_cp, device.type)
    master = master_dtype(config)
    policy = MixedPrecisionPolicy(param_dtype=config.params_dtype, reduce_dtype=master, cast_forward_inputs=False)
    for chunk in chunks:
        marks = {name: {mark: getattr(parameter, mark, False) for mark in _MARKS} for name, parameter in chunk.named_parameters()}
        blocks = [*chunk.double_blocks.values(), *chunk.single_blocks.values()]
        for block in blocks:
            _to_dtype(block, master)
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=zero_stage == 3)
        _to_dtype(chunk, master)
        # ZeRO-3, None: FSDP2 keeps the root's own parameters from its forward pass to its backward pass, which is about to need them
        fully_shard(chunk, mesh=mesh, mp_policy=policy, reshard_after_forward=None if zero_stage == 3 else False)
        for module in chunk.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # gradients are sums; they are divided once, by the number of samples
                module.set_force_sum_reduction_for_comms(True)
                module.set_reshard_after_backward(zero_stage == 3, recurse=False)
        _prefetch_backwards(chunk, blocks)
        for name, parameter in chunk.named_parameters():
            for mark, value in marks[name].items():
                setattr(parameter, mark, value)


def _prefetch_backwards(chunk: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Gather each block while the one after it runs its backward pass.

    FSDP2's own guess is the order of the last forward passes, which a pipeline does not reverse: it forgets it after the first of several
    micro-batches in flight, and gathers blocks in vain in chunks that have nothing but blocks.
    """
    for before, module in zip([chunk, *blocks], [*blocks, chunk], strict=True):
        assert isinstance(module, FSDPModule) and isinstance(before, FSDPModule)
        module.set_modules_to_backward_prefetch([before])  # before the first block is the chunk's own part: gathered already, or nothing


def _to_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Change the number format of what is not sharded yet, parameter by parameter: marks stay, and a block's old memory is free at once."""
    for parameter in module.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


class FullyShardedAdam:
    """Adam on this rank's rows, with the part of Megatron's optimizer that a run uses.

    Args:
        chunks: sharded by `shard_fully`.
        config: Megatron's settings of the chunks; its gradient finaliser is set here.
        optimizer: Adam's settings.
        context: this rank's groups.
    """

    def __init__(self, chunks: Sequence[MMDiT], *, config: TransformerConfig, optimizer: OptimizerConfig, context: ParallelContext) -> None:
        self.chunks, self.settings, self.context = list(chunks), optimizer, context
        self.dtype: torch.dtype = config.params_dtype
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._rows = [held_rows(parameter) for parameter in self._parameters]
        self._masters = [nn.Parameter(rows) for rows, _ in self._rows]
        self.adam = _build_adam(self._parameters, self._masters, optimizer)
        self._checked = False
        config.finalize_model_grads_func = self.finalize_gradients

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Adam's groups: matrices, and what is not decayed."""
        groups: list[dict[str, Any]] = self.adam.param_groups
        return groups

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            parameter.grad = master.grad = None

    def finalize_gradients(
        self,
        model: Sequence[nn.Module],
        num_tokens: Tensor | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        force_all_reduce: bool | None = False,
    ) -> None:
        """What is left to do when all micro-batches are through: sums over TP, and the division by the number of samples.

        Megatron's schedules call it (`config.finalize_model_grads_func`); the sums over DP x CP are done.

        Args:
            model, pg_collection, force_all_reduce: Megatron's; the object knows its own.
            num_tokens: int32, samples this rank counted (on the last stage).
        """
        groups = self.context.pg_collection
        gradients = self._gradients()
        shared = [g for p, g in zip(self._parameters, gradients, strict=True) if getattr(p, "sequence_parallel", False)]
        if groups.tp.size() > 1 and shared:
            flat = torch.cat([gradient.flatten() for gradient in shared])
            dist.all_reduce(flat, group=groups.tp)
            torch._foreach_copy_(shared, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in shared]), shared, strict=True)])
        if num_tokens is None:
            return
        dist.broadcast(num_tokens, src=dist.get_global_rank(groups.pp, groups.pp.size() - 1), group=groups.pp)
        dist.all_reduce(num_tokens, group=groups.dp_cp)
        if count := int(num_tokens):
            torch._foreach_mul_(gradients, 1.0 / count)

    def _gradients(self) -> list[Tensor]:
        """Gradients of the rows, in the order of the parameters."""
        gradients: list[Tensor] = []
        for parameter in self._parameters:
            assert parameter.grad is not None, "a parameter took no part in the step; DDP's would be zero"
            gradients.append(parameter.grad.to_local())  # type: ignore[attr-defined]
        return gradients

    @torch.no_grad()
    def step(self, *, accept: Callable[[float], bool]) -> tuple[float, bool]:
        """Clip by the global norm, step, and drop gathered parameters, which are old now; nothing of it where the norm is refused.

        Returns:
            (gradient norm before clipping, whether it was accepted).
        """
        self._check_memory()
        gradients = self._gradients()
        norm = self._norm(gradients)
        if not accept(norm):
            return norm, False
        limit = self.settings.clip_grad
        if limit > 0 and limit / (norm + 1e-6) < 1:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = gradient if master.numel() else None
        self.adam.step()
        reshard(self.chunks)
        return norm, True

    def _check_memory(self) -> None:
        """FSDP2 used to give padded rows new memory at the first forward pass (pytorch pull 163130); Adam would step on the old."""
        if self._checked:
            return
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            assert held_rows(parameter)[0].data_ptr() == master.data_ptr(), "FSDP2 moved the rows of a parameter after Adam had taken them"
        self._checked = True

    def _norm(self, gradients: Sequence[Tensor]) -> float:
        """Over all ranks; what TP ranks share is counted on the first."""
        counts = [getattr(parameter, "tensor_model_parallel", False) or self.context.at.tp == 0 for parameter in self._parameters]
        own = [gradient for gradient, counted in zip(gradients, counts, strict=True) if counted and gradient.numel()]
        squared = torch.zeros((), dtype=torch.float64, device=self.context.device)
        if own:
            squared += torch.stack(torch._foreach_norm(own)).double().square().sum()
        dist.all_reduce(squared)
        return float(squared.sqrt())

    def owned_shards(self) -> Iterator[OwnedShard]:
        """This rank's rows, parameter by parameter; one that has no row here is left out."""
        for parameter, (rows, first), master in zip(self._parameters, self._rows, self._masters, strict=True):
            if rows.numel():
                start = first * (rows.numel() // rows.shape[0])
                yield OwnedShard(
                    parameter=parameter,
                    start=start,
                    stop=start + rows.numel(),
                    master=master,
                    state=self.adam.state[master],
                    adam=self.adam,
                    counts_steps=counts_per_parameter(self.adam),
                    dtype=self.dtype,
                )

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Round freshly written weights to the model's number format, where ZeRO-1's masters start: every stage trains the same curve."""
        for master in self._masters:
            master.copy_(master.to(self.dtype))


def _build_adam(parameters: Sequence[Tensor], masters: Sequence[nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """The Adam that Megatron would take here (Transformer Engine's, apex's or torch's); it passes over what has no row on this rank,
    because that gets no gradient."""
    decayed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter, master in zip(parameters, masters, strict=True):
        decayed[parameter.dim() > 1].append(master)
    groups = [
        {"params": members, "weight_decay": settings.weight_decay if matrices else 0.0} for matrices, members in decayed.items() if members
    ]
    kwargs: dict[str, Any] = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    if not USING_PYTORCH_OPTIMIZER:
        kwargs |= {"adam_w_mode": True}
    adam: torch.optim.Optimizer = Adam(groups, **kwargs, **moment_formats(settings))
    return adam

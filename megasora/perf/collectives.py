"""Bytes of every collective of one training step on one rank, as formulas (docs/architecture.md); a test counts the real ones.

Convention: a collective's bytes are its payload on the rank, whatever the algorithm sends: the whole gathered tensor of an all-gather, the
whole input of a reduce-scatter, the tensor of an all-reduce or all-to-all, the message of a send.
Letters: S tokens of a context rank (padded, all of its TP shares), s = S / TP, n samples of the pack, H hidden, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass

from megasora.config.schema import ModelConfig


@dataclass(frozen=True, kw_only=True)
class StageShape:
    """The part of the model on a rank."""

    num_double: int
    num_single: int
    pre_process: bool = True
    post_process: bool = True


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Payload bytes by kind of collective."""

    all_gather: int = 0
    reduce_scatter: int = 0
    all_reduce: int = 0
    all_to_all: int = 0
    send: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})


def tensor_parallel_traffic(stage: StageShape, *, model: ModelConfig, tp: int, tokens: int, samples: int, itemsize: int) -> Traffic:
    """Forward and backward of one micro-batch over TP, sequence parallel.

    A column-parallel layer gathers its input forward, gathers it again and scatters its gradient backward; a row-parallel layer scatters
    forward and gathers backward. A double block has 2 + 2 of them over S H elements (its two streams together), a single block 1 + 1.
    A modulation gathers n x m H forward, scatters as much backward, and all-reduces the n x H gradient of `vec`.
    """
    if tp == 1:
        return Traffic()
    h = model.hidden_size
    layers = 2 * stage.num_double + stage.num_single
    rows = 12 * stage.num_double + 3 * stage.num_single + (2 if stage.post_process else 0)
    modulations = 2 * stage.num_double + stage.num_single + (1 if stage.post_process else 0)
    return Traffic(
        all_gather=itemsize * (3 * layers * tokens * h + rows * samples * h),
        reduce_scatter=itemsize * (2 * layers * tokens * h + rows * samples * h),
        all_reduce=itemsize * modulations * samples * h,
    )


def ulysses_traffic(stage: StageShape, *, model: ModelConfig, tp: int, size: int, tokens: int, itemsize: int) -> Traffic:
    """Forward and backward of one micro-batch: q, k, v out and the output back, twice: 8 S H / TP elements a block."""
    if size == 1:
        return Traffic()
    blocks = stage.num_double + stage.num_single
    return Traffic(all_to_all=itemsize * 8 * blocks * tokens * model.hidden_size // tp)


def ring_traffic(stage: StageShape, *, model: ModelConfig, tp: int, size: int, tokens: int, itemsize: int, grad_itemsize: int) -> Traffic:
    """Forward and backward of one micro-batch: k and v take R - 1 hops each way, their gradients R hops home (in the lse's dtype)."""
    if size == 1:
        return Traffic()
    blocks = stage.num_double + stage.num_single
    elements = 2 * tokens * model.hidden_size // tp
    return Traffic(send=blocks * elements * (2 * (size - 1) * itemsize + size * grad_itemsize))


def pipeline_traffic(*, model: ModelConfig, share_tokens: int, samples: int, forward: bool, backward: bool, itemsize: int) -> Traffic:
    """Sends of one micro-batch by one chunk: (s + n) H forward unless it is the last, as much backward unless it is the first."""
    return Traffic(send=itemsize * (share_tokens + samples) * model.hidden_size * (int(forward) + int(backward)))


def sequence_parallel_gradients(stage: StageShape, *, model: ModelConfig) -> int:
    """Elements of the gradients that are summed over TP once per step: what acts on token shares without being a TP shard."""
    h, k = model.hidden_size, model.head_dim
    elements = stage.num_double * 2 * (2 * h + 2 * k) + stage.num_single * (h + 2 * k)
    if stage.pre_process:
        elements += (model.in_channels + 1) * h + (model.text_dim + 1) * h
        elements += (model.cond_channels + 1) * h if model.cond_embed else 0
    if stage.post_process:
        elements += (h + 1) * model.in_channels
    return elements


def step_end_traffic(
    stage: StageShape, *, model: ModelConfig, tp: int, parameters: int, distributed_optimizer: bool, itemsize: int, grad_itemsize: int
) -> Traffic:
    """Once per step: gradients over DP x CP and over TP, the int32 number of samples, and ZeRO-1's parameter gather.

    Args:
        parameters: elements of this rank's parameters (padded to the optimizer's buckets with ZeRO-1).
    """
    reduced = 4 + (grad_itemsize * sequence_parallel_gradients(stage, model=model) if tp > 1 else 0)
    if distributed_optimizer:
        return Traffic(reduce_scatter=grad_itemsize * parameters, all_gather=itemsize * parameters, all_reduce=reduced)
    return Traffic(all_reduce=reduced + grad_itemsize * parameters)


def fully_sharded_traffic(
    *, zero_stage: int, blocks: int, rest: int, shards: int, microbatches: int, itemsize: int, grad_itemsize: int
) -> Traffic:
    """One step of a chunk over DP x CP with ZeRO-2 or ZeRO-3: gathered weights and reduced gradients.

    Gradients are reduce-scattered after every micro-batch. ZeRO-2 gathers once a step. ZeRO-3 gathers a block for its forward pass and for
    its backward pass (where recomputation finds it), and what is in no block once a micro-batch: it is kept from a forward to the next
    backward pass, whatever the pipeline runs between. Once a step the number of samples is added up, and over TP this rank's rows of the
    gradients of `sequence_parallel_gradients` (not here).

    Args:
        zero_stage: 2 or 3.
        blocks: elements of this rank's (TP-sharded) parameters in blocks, rows padded to a multiple of the shards.
        rest: of the others.
        shards: ranks of DP x CP.
        microbatches: per step.
        itemsize: bytes of a weight in the model's format.
        grad_itemsize: of a reduced gradient.
    """
    if shards == 1:
        return Traffic(all_reduce=4)
    gathered = blocks + rest if zero_stage == 2 else microbatches * (2 * blocks + rest)
    return Traffic(all_gather=itemsize * gathered, reduce_scatter=grad_itemsize * microbatches * (blocks + rest), all_reduce=4)


def recompute_traffic(
    *, double: int, single: int, model: ModelConfig, tp: int, ulysses: int, ring: int, tokens: int, samples: int, itemsize: int
) -> Traffic:
    """What the forward passes of blocks that run twice send once more, for one micro-batch.

    Args:
        double, single: such blocks.
        model: sizes.
        tp, ulysses, ring: sizes of the groups.
        tokens, samples: of the pack (`tensor_parallel_traffic`).
        itemsize: bytes of an activation.
    """
    h, layers = model.hidden_size, 2 * double + single
    rows = itemsize * (12 * double + 3 * single) * samples * h
    over_tp = (
        Traffic(all_gather=itemsize * layers * tokens * h + rows, reduce_scatter=itemsize * layers * tokens * h) if tp > 1 else Traffic()
    )
    elements = (double + single) * tokens * h // tp
    exchanged = Traffic(all_to_all=itemsize * 4 * elements) if ulysses > 1 else Traffic()
    passed_on = Traffic(send=itemsize * 2 * (ring - 1) * elements)
    return over_tp + exchanged + passed_on

"""A training step's batch without a feeder."""

from __future__ import annotations

from megasora.data.plan import SamplerState, StepPlan
from megasora.models.mmdit.schedule import MicroBatch
from megasora.training.feed import Balance, StepBatch


def step_batch(batches: list[MicroBatch], *, tokens: int) -> StepBatch:
    """A rank's micro-batches with what the feeder would say of them."""
    return StepBatch(
        batches=batches,
        plan=StepPlan(position=SamplerState(), samples=(0,), state_after=SamplerState()),
        tokens=tokens,
        flops_tokens=(tokens,),
        skipped=(),
        wait_s=0.0,
        frames=0,
        decode_s=0.0,
        encode_s=0.0,
        balance=Balance(pad_share=0.0, imbalance=1.0),
    )

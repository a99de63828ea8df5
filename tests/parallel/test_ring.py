"""The ring's messages travel while it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megasora.parallel import context
from tests.pool import RankPool


def backward_events(rank: int, size: int) -> list[str]:
    """What a member does in the backward pass, in order; in bf16 keys travel in bf16 and gradients in fp32, the log-sum-exp's type."""
    torch.manual_seed(rank)
    q, k, v = (torch.randn(4, 2, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = context._Ring.apply(q, k, v, torch.distributed.group.WORLD, ((4,),) * size)
    names = {torch.bfloat16: "keys", torch.float32: "gradients"}
    events: list[str] = []
    real = context._pass_on, context.chunk_backward, context._Hop.arrive

    def pass_on(*args: Any) -> Any:
        hop = real[0](*args)
        events.append(f"{names[hop.received.dtype]} sent")
        return hop

    def compute(*args: Any, **kwargs: Any) -> Any:
        events.append("compute")
        return real[1](*args, **kwargs)

    def arrive(hop: Any) -> Tensor:
        events.append(f"{names[hop.received.dtype]} there")
        return real[2](hop)

    context._pass_on, context.chunk_backward, context._Hop.arrive = pass_on, compute, arrive
    try:
        out.sum().backward()
    finally:
        context._pass_on, context.chunk_backward, context._Hop.arrive = real
    return events


def test_gradients_travel_while_the_next_chunk_is_computed(pool: RankPool) -> None:
    """`size` hops of gradients, `size` - 1 of keys; every hop but the last home is under way during a computation."""
    first = ["keys sent", "compute", "keys there", "gradients sent"]
    middle = ["keys sent", "compute", "gradients there", "keys there", "gradients sent"]
    last = ["compute", "gradients there", "gradients sent", "gradients there"]
    for events in pool.run(3, backward_events, 3):
        assert events == first + middle + last

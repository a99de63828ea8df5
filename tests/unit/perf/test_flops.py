"""FLOPs by hand: 24 H^2 S + 4 S^2 H a block forward, three times that with the backward."""

from __future__ import annotations

from megasora.perf.flops import block_forward_flops, training_flops


def test_flops_of_a_block_and_of_training() -> None:
    assert block_forward_flops(2, hidden_size=3) == 24 * 9 * 2 + 4 * 4 * 3 == 480
    assert training_flops([2, 2, 4], hidden_size=3, num_blocks=5) == 3 * 5 * (480 + 480 + 1056)

"""Bytes counted by hand, and what a block may move."""

from __future__ import annotations

import pytest
import torch

from benchmarks.block_bytes import count
from megasora.perf.memory_traffic import MemoryTraffic

KILO = 1024 * 4
"""Bytes of 1,024 fp32 values."""


def test_an_operation_counts_what_it_reads_and_writes() -> None:
    a, b, index = torch.zeros(32, 32), torch.zeros(32, 32), torch.arange(16)
    with MemoryTraffic() as traffic:
        _ = a + b  # two read, one written
        a.mul_(b)  # a read and written, b read
        torch.mul(a, b, out=a)  # the output is written once more
        _ = a.t()[:7].unsqueeze(0)  # views
        _ = a.index_select(0, index)  # half of a read and written
        _ = torch.empty(1000)
    assert dict(traffic.bytes) == {"add": 3 * KILO, "mul_": 3 * KILO, "mul": 3 * KILO, "index_select": KILO}
    assert dict(traffic.calls) == {"add": 1, "mul_": 1, "mul": 1, "index_select": 1}


def test_products_are_flops_unless_they_are_skinny() -> None:
    wide, narrow, weight = torch.zeros(64, 128), torch.zeros(2, 128), torch.zeros(128, 256)
    with MemoryTraffic() as traffic:
        _ = wide @ weight
        _ = narrow @ weight
    assert traffic.product_flops == 2 * 64 * 128 * 256
    assert dict(traffic.bytes) == {"mm": 4 * (2 * 128 + 128 * 256 + 2 * 256)}


@pytest.mark.parametrize(("block", "limit"), [("single", 51), ("double", 61)])
def test_a_block_of_triton_kernels_stays_within_its_passes(block: str, limit: float) -> None:
    # passes over [tokens, H], written out in docs/architecture.md; the modulation's products read their weights, whatever the tokens
    row = count(block, "triton", 6)
    products = row.operations.get("mm", 0.0) + row.operations.get("addmm", 0.0)
    assert row.passes - products < limit, row.operations


def test_a_pack_of_one_clip_is_moved_less() -> None:
    # its tokens are in attention's order already: a stream of a double block takes its rows where they stand
    assert "collect_heads" not in count("double", "triton", 1).operations

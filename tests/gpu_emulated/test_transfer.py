"""What is sent to the device arrives whole, in one pinned copy that the host does not wait for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megasora.parallel.pack import Pack, PackSplit, SampleShape
from megasora.parallel.transfer import send
from tests.gpu_emulated.memory import EmulatedMemory, watch
from tests.pool import RankPool

SAMPLES = (SampleShape(text_tokens=5, grid=(2, 3, 3)), SampleShape(text_tokens=7, grid=(1, 5, 5)))
GPU = torch.device("cuda", 0)


def count_copies(memory: EmulatedMemory) -> list[str | None]:
    """Filled with where each later copy to the device comes from."""
    sources: list[str | None] = []
    real = memory._copy

    def copy(target: Any, source: Any, *, non_blocking: bool) -> None:
        sources.append(source)
        real(target, source, non_blocking=non_blocking)

    memory._copy = copy  # type: ignore[method-assign]
    return sources


def send_some(rank: int) -> None:
    """Asserts on the rank: emulated device tensors do not travel to the test."""
    given = [
        torch.arange(5),
        torch.tensor([True, False, True]),
        torch.zeros(0, 3),
        torch.tensor(2.5, dtype=torch.float64),
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(3, dtype=torch.bfloat16),
    ]
    with watch() as memory:
        copies = count_copies(memory)
        there = torch.ones(2, device=GPU)
        sent = send([*given, there], device=GPU)
        assert copies == ["pinned"]
        assert all(memory.on_device(tensor) for tensor in sent)
        assert sent[-1] is there
        assert not memory.waits
        for one, other in zip(given, sent, strict=False):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            assert one.tolist() == other.tolist()
    assert send(given, device=torch.device("cpu"))[0] is given[0]


def test_tensors_arrive_whole_in_one_copy(gpus: RankPool) -> None:
    gpus.run(1, send_some)


def tables(pack: Pack, orders: list[range]) -> list[Tensor]:
    found = [pack.text_runs.index, pack.video_runs.index, pack.positions]
    for order in map(pack.attention_order, orders):
        found += [tensor for tensor in (order.index, order.inverse, order.cu_seqlens) if tensor is not None]
    return found


def prepare_pack(rank: int) -> None:
    """Asserts on the rank."""
    split, orders = PackSplit(tp=2, cp=4), [range(0, 2), range(2, 4)]
    expected = tables(Pack(SAMPLES, split=split, tp_rank=1, cp_rank=2), orders)
    with watch() as memory:
        copies = count_copies(memory)
        pack = Pack(SAMPLES, split=split, tp_rank=1, cp_rank=2, device=GPU)
        pack.prepare(orders)
        found = tables(pack, orders)
        parts = [pack.text_index, pack.video_index, *pack.video_tokens_of(1), *pack.text_tokens_of(0), pack.joint_runs.index]
        assert copies == ["pinned"]
        assert all(memory.on_device(tensor) for tensor in (*found, *parts))
        assert not memory.waits
        assert [tensor.tolist() for tensor in found] == [tensor.tolist() for tensor in expected]


def test_all_indices_of_a_pack_are_sent_in_one_copy(gpus: RankPool) -> None:
    """Expected: the tables of the same pack on the CPU, made when asked for."""
    gpus.run(1, prepare_pack)

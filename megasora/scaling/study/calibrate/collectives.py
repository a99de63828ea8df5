"""Bandwidth and latency of collectives over all ranks of the world, and what ranks at work at once lose by sharing a computer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megasora.config.parameters import parameter_count
from megasora.config.schema import ModelConfig
from megasora.scaling.study.calibrate.timing import wait

OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send")
TOGETHER_S = 0.4
"""How long ranks are at work at once."""
LARGEST_BYTES = 2**28
"""Of weights and gradients that they pass through: more than a computer's caches hold."""
WORK_ROWS, WORK_PRODUCTS = 128, 4
"""Products beside a collective on a CPU, a fraction of a millisecond: what a block does between two."""
CALLS = 10
"""Collectives in a row beside them."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One collective of one size."""

    operation: str
    payload_bytes: int
    """Convention of megasora.perf.collectives: the gathered tensor, the scattered input, the tensor, the message."""
    sent_bytes: float
    """That a rank sends, by the ring: (n-1)/n of the payload, twice that for an all-reduce, the payload of a message."""
    seconds: float
    """Median over repeats: of the slowest rank, on a CPU what it adds to ranks at work."""
    steps: int = 1
    """Of its ring."""


def transfers(sizes: Sequence[int], *, device: torch.device, repeats: int) -> list[Transfer]:
    """Every operation at every payload in bytes; all ranks of the world call it together, which must be at least two."""
    found = []
    for operation in OPERATIONS:
        for size in sizes:
            call = _call(operation, size, device)
            found.append(
                Transfer(
                    operation=operation,
                    payload_bytes=size,
                    sent_bytes=sent_bytes(operation, size, ranks=dist.get_world_size()),
                    seconds=_slowest(call, device=device, repeats=repeats),
                    steps=ring_steps(operation, ranks=dist.get_world_size()),
                )
            )
    return found


def sent_bytes(operation: str, payload: int, *, ranks: int) -> float:
    """Bytes that a rank sends for a payload, as rings do it (NCCL's bus bandwidth is the same measure)."""
    share = {"all_gather": (ranks - 1) / ranks, "reduce_scatter": (ranks - 1) / ranks, "all_reduce": 2 * (ranks - 1) / ranks}
    return payload * {**share, "all_to_all": (ranks - 1) / ranks, "send": 1.0}[operation]


def ring_steps(operation: str, *, ranks: int) -> int:
    """Messages one after another of a collective."""
    return {"all_reduce": 2 * (ranks - 1), "send": 1}.get(operation, ranks - 1)


def fit(found: Sequence[Transfer]) -> tuple[float, float]:
    """(bytes/s, latency in s) of a link: the median over operations of the largest size's rate, and of the smallest size's time a step.

    A ring of n ranks has n - 1 steps, an all-reduce twice as many, a message one (`perf.network`).
    """
    rates, latencies = [], []
    for operation in dict.fromkeys(entry.operation for entry in found):
        own = sorted((entry for entry in found if entry.operation == operation), key=lambda entry: entry.payload_bytes)
        latencies.append(own[0].seconds / own[0].steps)
        rates.append(own[-1].sent_bytes / max(own[-1].seconds - own[0].seconds, own[-1].seconds * 0.1))
    return statistics.median(rates), statistics.median(latencies)


def _call(operation: str, size: int, device: torch.device) -> Callable[[], object]:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    elements = max(ranks, size // 4 // ranks * ranks)
    whole = torch.ones(elements, device=device)
    part = torch.ones(elements // ranks, device=device)
    other = torch.empty_like(whole)
    if operation == "send":
        return lambda: _pass_on(whole, other, rank=rank, ranks=ranks)
    calls: dict[str, Callable[[], object]] = {
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_reduce": lambda: dist.all_reduce(whole, op=dist.ReduceOp.MAX),  # sums of sums would overflow
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
    }
    return calls[operation]


def _pass_on(message: Tensor, arrived: Tensor, *, rank: int, ranks: int) -> None:
    """A message to the next rank, from the one before: all links at once."""
    work = [dist.P2POp(dist.isend, message, (rank + 1) % ranks), dist.P2POp(dist.irecv, arrived, (rank - 1) % ranks)]
    for request in dist.batch_isend_irecv(work):
        request.wait()


def _slowest(call: Callable[[], object], *, device: torch.device, repeats: int) -> float:
    """Median over repeats of the slowest rank's seconds for a call; every repeat begins together.

    On a CPU it is what a call adds to ranks at work: gloo's threads wait for a core that computes, and ranks for each other.
    """
    call()
    times = []
    for _ in range(repeats):
        dist.barrier()
        wait(device)
        if device.type == "cpu":
            times.append(_added(call))
            continue
        started = time.perf_counter()
        call()
        wait(device)
        longest = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        times.append(float(longest))
    return statistics.median(times)


def _added(call: Callable[[], object]) -> float:
    """Seconds that a call adds to a stretch of work that all ranks do, mean over ranks."""
    x = torch.ones(WORK_ROWS, WORK_ROWS)
    seconds = []
    for what in (call, None):
        dist.barrier()
        started = time.perf_counter()
        for _ in range(CALLS):
            for _ in range(WORK_PRODUCTS):
                x @ x
            if what is not None:
                what()
        seconds.append(time.perf_counter() - started)
    both = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(both)
    return max(float(both[0] - both[1]) / dist.get_world_size() / CALLS, 1e-6)


def compute_losses(model: ModelConfig, *, rows: int, device: torch.device, dtype: torch.dtype, repeats: int) -> list[tuple[float, float]]:
    """Ranks at work at once on one computer -> mean rate of each over that of one alone; all ranks call it together.

    Every rank computes for the same stretch of time: one that was ready sooner would else be measured alone.

    Args:
        model: whose weights are passed through, as many as there are, so that ranks take each other's caches as in a step.
        rows: tokens of a pass.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    counts = sorted({1, *(count for count in (2, 4, 8, 16) if count < world), world})
    h, ffn = model.hidden_size, model.ffn_hidden_size
    layers = max(1, min(LARGEST_BYTES // 8, parameter_count(model)) // (h * ffn))
    x = torch.randn(rows, h, device=device, dtype=dtype)
    weights = [(torch.randn(ffn, h, device=device, dtype=dtype), torch.zeros(ffn, h, device=device)) for _ in range(layers)]
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(repeats):  # counts in turn: a machine that slows down slows no count more than others
        for count in counts:
            dist.barrier()
            own = torch.tensor([_calls_per_s(x, weights) if rank < count else 0.0], dtype=torch.float64)
            dist.all_reduce(own)
            rates[count].append(float(own) / count)
    alone = statistics.median(rates[1])
    return [(float(count), min(1.0, statistics.median(found) / alone)) for count, found in rates.items()]


def _calls_per_s(x: Tensor, weights: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Layers a second: the product forward, the two backward, the second added to the weight's gradient."""
    calls, started = 0, time.perf_counter()
    while True:
        for weight, grad in weights:
            out = F.linear(x, weight)
            out @ weight
            grad += out.T @ x
            calls += 1
            if time.perf_counter() - started > TOGETHER_S:
                return calls / (time.perf_counter() - started)

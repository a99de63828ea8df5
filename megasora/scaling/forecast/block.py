"""Time of one block on one rank for one pack: what its kernels do and what it exchanges.

Letters: S tokens of a context rank's share times TP, s = S / TP of one rank, n samples, H hidden, t TP ranks, c CP ranks.
Counts: FLOPs of products 24 H^2 s, of attention 4 H sum(length^2) / (t c) forward and 2.5 times that backward; bytes of
everything else in passes over the share's tokens (benchmarks/results/2026-11-25_block_bytes.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megasora.config.memory import number_bytes, ulysses_size
from megasora.config.pack_tokens import FP8_ROW_MULTIPLE
from megasora.config.schema import ModelConfig, RunConfig
from megasora.perf.hardware import Hardware, rate_at
from megasora.perf.network import Placement, collective_s, placement_of
from megasora.scaling.forecast.cost import Cost

PASSES = {
    "triton": {True: (25.8, 35.0), False: (20.8, 29.8)},
    "torch": {True: (86.8, 149.1), False: (76.9, 132.0)},
}
"""Kernels -> double or single block -> (forward, backward) reads and writes of s x H numbers outside products and attention, without the
modulation's products (2026-11-25_block_bytes.md, six clips)."""
LAUNCHES = {
    "triton": {True: (66, 100), False: (33, 50)},
    "torch": {True: (99, 168), False: (43, 70)},
}
"""Kernels launched forward and backward: with Triton's 121 a block together on an H100 (trace, 2 double and 4 single blocks; how they
divide is chosen), torch's of a pack of several samples beside `TORCH_SAMPLE`, counted on a CPU (tests/unit/scaling/test_forecast.py)."""
TORCH_SAMPLE = {True: (4, 24), False: (2, 12)}
"""Of torch's, for every sample: each has modulations of its own."""
TORCH_ALONE = {True: (81, 162), False: (37, 67)}
"""Of torch's where a pack is one sample, which needs no sorting."""
BACKWARD_ATTENTION = 2.5
"""FLOPs of attention's backward pass over its forward pass: five products for two (FlashAttention-2, arXiv 2307.08691)."""


@dataclass(frozen=True, kw_only=True)
class PackWork:
    """A pack as a rank sees it."""

    share: int
    """Tokens of one rank of TP x CP, padded."""
    text_share: int
    """Those of them that are text."""
    lengths: tuple[int, ...]
    """Text and video tokens of each sample, whole."""

    @property
    def samples(self) -> int:
        """Samples of the pack."""
        return len(self.lengths)

    @property
    def squares(self) -> int:
        """Sum of squared lengths: what attention costs."""
        return sum(length * length for length in self.lengths)


@dataclass(frozen=True, kw_only=True)
class BlockSetting:
    """All that a block's time depends on besides its pack."""

    model: ModelConfig
    hardware: Hardware
    tp: int
    cp: int
    ulysses: int
    fp8: bool
    kernels: str
    number: int
    """Bytes of an activation."""
    slower: float = 1.0
    """Factor on all compute: ranks that share a computer's units."""

    @property
    def tensor_group(self) -> Placement:
        """Where the ranks of a TP group stand."""
        return placement_of(size=self.tp, stride=1, domain=self.hardware.node.ranks)

    @property
    def ulysses_group(self) -> Placement:
        """Where ranks that exchange heads stand."""
        return placement_of(size=self.ulysses, stride=self.tp, domain=self.hardware.node.ranks)

    @property
    def ring_group(self) -> Placement:
        """Where ranks that pass keys and values around stand."""
        return placement_of(size=self.cp // self.ulysses, stride=self.tp * self.ulysses, domain=self.hardware.node.ranks)


def setting_of(config: RunConfig, *, hardware: Hardware, slower: float = 1.0) -> BlockSetting:
    """What a run's blocks depend on."""
    parallel, precision = config.parallel, config.precision
    on_cpu = hardware.device == "cpu"
    return BlockSetting(
        model=config.model,
        hardware=hardware,
        tp=parallel.tensor_model_parallel_size,
        cp=parallel.context_parallel_size,
        ulysses=ulysses_size(config),
        fp8=precision.fp8 != "none",
        kernels="torch" if on_cpu or precision.kernels == "torch" else "triton",
        number=number_bytes(config),
        slower=slower,
    )


def row_multiple(config: RunConfig) -> int:
    """Rows that a rank's share is padded to."""
    return FP8_ROW_MULTIPLE[config.precision.fp8]


@lru_cache(maxsize=16384)
def forward_cost(setting: BlockSetting, work: PackWork, *, double: bool) -> Cost:
    """A block's forward pass."""
    return _compute(setting, work, double=double, backward=False) + _exchanges(setting, work, double=double, backward=False)


@lru_cache(maxsize=16384)
def backward_cost(setting: BlockSetting, work: PackWork, *, double: bool, mode: str) -> Cost:
    """A block's backward pass, with what `mode` (none, selective, full) computes again."""
    cost = _compute(setting, work, double=double, backward=True) + _exchanges(setting, work, double=double, backward=True)
    if mode == "full":
        cost += forward_cost(setting, work, double=double)
    elif mode == "selective":
        bytes_again = PASSES[setting.kernels][double][0] * work.share * setting.model.hidden_size * setting.number
        cost += Cost(compute=_memory_s(setting, bytes_again, launches=block_launches(setting, work, double=double, backward=False)))
    return cost


def block_launches(setting: BlockSetting, work: PackWork, *, double: bool, backward: bool) -> int:
    """Kernels that a block's pass launches, as counted (`LAUNCHES`); a ring attends sample by sample and hop by hop."""
    samples, ring = work.samples, setting.cp // setting.ulysses
    launches = LAUNCHES[setting.kernels][double][backward]
    if setting.kernels == "torch":
        each = TORCH_SAMPLE[double][backward]
        launches = TORCH_ALONE[double][backward] if samples == 1 else launches + each * samples
    if ring > 1:
        launches += 12 * ring + 10 * ring * samples if backward else 12 * ring - 10 + 6 * ring * samples
    elif setting.kernels == "torch" and len(set(work.lengths)) > 1:  # torch's attention of unequal lengths
        launches += 2 * samples + 2 if backward else samples
    return launches


def _compute(setting: BlockSetting, work: PackWork, *, double: bool, backward: bool) -> Cost:
    """Kernels, and what launching them takes beyond them."""
    model, rates = setting.model, setting.hardware.rates
    h = model.hidden_size
    flops = linear_flops(model) * work.share
    rows = work.share * setting.tp  # a product's rows are gathered over TP
    matmul = rates.matmul_fp8 if setting.fp8 and rates.matmul_fp8 else rates.matmul
    products = flops * (2 if backward else 1) / rate_at(matmul, rows)
    attention_flops = 4 * h * work.squares / (setting.tp * setting.cp) * (BACKWARD_ATTENTION if backward else 1)
    curve = rates.attention_backward if backward else rates.attention_forward
    attention = attention_flops / rate_at(curve, work.squares / max(1, sum(work.lengths)))
    launches = block_launches(setting, work, double=double, backward=backward)
    modulation = (12 if double else 3) * h * h * setting.number / setting.tp * (2 if backward else 1)
    moved = PASSES[setting.kernels][double][backward] * work.share * h * setting.number + modulation
    device = (products + attention) * setting.slower + _memory_s(setting, moved, launches=launches)
    host = launches * setting.hardware.launch_s * setting.slower
    if setting.hardware.device == "cpu":
        return Cost(compute=device, gaps=host)
    return Cost(compute=device, gaps=max(0.0, host - device))


def linear_flops(model: ModelConfig) -> int:
    """Forward FLOPs per token of a block's linear layers: of either kind a token passes through 4 attention and 2 feed-forward matrices."""
    return 2 * (4 * model.hidden_size**2 + 2 * model.hidden_size * model.ffn_hidden_size)


def _memory_s(setting: BlockSetting, size_bytes: float, *, launches: int) -> float:
    """Seconds of memory-bound kernels that move `size_bytes` together."""
    return size_bytes / rate_at(setting.hardware.rates.memory, size_bytes / max(1, launches)) * setting.slower


def _exchanges(setting: BlockSetting, work: PackWork, *, double: bool, backward: bool) -> Cost:
    tensor = _tensor_parallel_s(setting, work, double=double, backward=backward) if setting.tp > 1 else 0.0
    context = _context_parallel_s(setting, work, backward=backward) if setting.cp > 1 else 0.0
    return Cost(tensor_parallel=tensor, context_parallel=context)


def _tensor_parallel_s(setting: BlockSetting, work: PackWork, *, double: bool, backward: bool) -> float:
    """Collectives of `perf.collectives.tensor_parallel_traffic`, by direction.

    A column-parallel layer gathers forward, gathers and scatters backward; a row-parallel layer scatters forward and gathers backward; two
    streams exchange apart.
    """
    hardware, group, number, h = setting.hardware, setting.tensor_group, setting.number, setting.model.hidden_size
    layers, streams = (2, 2) if double else (1, 1)
    payload = work.share * setting.tp * h * number / streams
    rows = (12 if double else 3) * work.samples * h * number
    gathers, scatters = (2 * layers, layers) if backward else (layers, layers)
    seconds = streams * gathers * collective_s("all_gather", payload, placement=group, hardware=hardware)
    seconds += streams * scatters * collective_s("reduce_scatter", payload, placement=group, hardware=hardware)
    modulations = 2 if double else 1
    if backward:
        seconds += modulations * collective_s("reduce_scatter", rows / modulations, placement=group, hardware=hardware)
        return seconds + modulations * collective_s("all_reduce", work.samples * h * number, placement=group, hardware=hardware)
    return seconds + modulations * collective_s("all_gather", rows / modulations, placement=group, hardware=hardware)


def _context_parallel_s(setting: BlockSetting, work: PackWork, *, backward: bool) -> float:
    """Ulysses: q, k, v out and the result back, exposed. Ring: what a hop takes longer than the attention beside it."""
    h, number = setting.model.hidden_size, setting.number
    tokens = work.share  # of a rank: S H / TP numbers of a context rank are share x H of each of its TP ranks
    seconds = 0.0
    if setting.ulysses > 1:
        for tensors in (3, 1):
            payload = tensors * tokens * h * number
            seconds += collective_s("all_to_all", payload, placement=setting.ulysses_group, hardware=setting.hardware)
    ring = setting.cp // setting.ulysses
    if ring > 1:
        hops = 2 * ring - 1 if backward else ring - 1
        payload = 2 * tokens * h * (4 if backward else number)
        hop = collective_s("send", payload, placement=setting.ring_group, hardware=setting.hardware)
        flops = 4 * h * work.squares / (setting.tp * setting.cp) * (BACKWARD_ATTENTION if backward else 1)
        rates = setting.hardware.rates
        curve = rates.attention_backward if backward else rates.attention_forward
        beside = flops / ring / rate_at(curve, work.squares / max(1, sum(work.lengths)) / ring)
        seconds += hops * max(0.0, hop - (beside if setting.hardware.device == "cuda" else 0.0))
    return seconds

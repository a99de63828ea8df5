"""What a stage's packs will look like on a number of replicas, without GPUs: padding, balance of work, tokens of the fullest pack.

Also the published bucket scheme, implemented from its description, for comparison: samples of one shape class form batches of a fixed size,
every rank takes another batch, and the step waits for the slowest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.data.manifest import read_manifest
from megasora.data.plan import Mix, SamplerState, assign_packs, epoch_order, mix_of, next_step, plan_clips, sample_cost
from megasora.parallel.pack import PackSplit, SampleShape

BUCKET_BATCHES: dict[int, dict[str, dict[int, int]]] = {
    1: {"256px": {1: 45, 33: 12, 65: 6, 97: 4, 129: 3}, "768px": {1: 13}, "1024px": {1: 7}},
    4: {"256px": {1: 195, 33: 80, 65: 40, 97: 28, 129: 23}, "768px": {1: 38, 33: 10, 65: 5, 97: 3, 129: 2}},
}
"""Context ranks -> class -> longest frame count -> samples of a batch, which those ranks share: bucket_config of hpcaitech/Open-Sora
configs/diffusion/train/stage1.py and stage2_i2v.py. The Open-Sora 2.0 report, section 4, has 6 and 4 of 768px with 33 and 65 frames."""


def published_batch(resolution: str, num_frames: int, *, context_ranks: int) -> int:
    """Samples of a published batch.

    Raises:
        UserError: there is no such bucket.
    """
    sizes = BUCKET_BATCHES.get(context_ranks, {}).get(resolution, {})
    bound = num_frames if num_frames == 1 else min((bound for bound in sizes if bound >= num_frames), default=0)
    if bound not in sizes:
        known = "; ".join(f"CP {ranks}: {', '.join(classes)}" for ranks, classes in BUCKET_BATCHES.items())
        raise UserError(f"there is no published batch size for {num_frames} frames of {resolution} at CP {context_ranks}, only for {known}")
    return sizes[bound]


@dataclass(frozen=True, kw_only=True)
class PackStats:
    """Figures of the steps that were simulated."""

    steps: int
    samples: int
    tokens: int
    """Text and video tokens of all samples."""
    tokens_per_replica: float
    """Mean per step."""
    pad_share: float
    """Padding over all tokens computed."""
    imbalance_mean: float
    """Mean over steps of (work of the busiest replica / mean work); the step waits for the busiest."""
    imbalance_p99: float
    fullest_pack_tokens: int
    """Most tokens of a pack: what memory must hold."""
    work: float
    """FLOPs per block and channel of all samples."""
    time: float
    """The same of the busiest replica, summed over steps: what the epoch takes."""

    @property
    def efficiency(self) -> float:
        """Share of the replicas' time that is work."""
        return self.work / self.time


class _Sums:
    """Adds up steps."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self.ratios: list[float] = []
        self.samples = self.tokens = self.computed = self.fullest = 0
        self.work = self.time = 0.0

    def add(self, loads: Sequence[float], *, samples: int, tokens: int, computed: int, fullest: int) -> None:
        """Count a step."""
        total = sum(loads)
        self.ratios.append(max(loads) * len(loads) / total)
        self.samples += samples
        self.tokens += tokens
        self.computed += computed
        self.fullest = max(self.fullest, fullest)
        self.work += total
        self.time += max(loads) * self.replicas

    def stats(self) -> PackStats:
        """The figures."""
        ratios = np.array(self.ratios)
        return PackStats(
            steps=len(ratios),
            samples=self.samples,
            tokens=self.tokens,
            tokens_per_replica=self.tokens / len(ratios) / self.replicas,
            pad_share=1 - self.tokens / self.computed,
            imbalance_mean=float(ratios.mean()),
            imbalance_p99=float(np.quantile(ratios, 0.99)),
            fullest_pack_tokens=self.fullest,
            work=self.work,
            time=self.time,
        )


def simulate_packs(
    shapes: Sequence[SampleShape],
    *,
    data_parallel_size: int,
    num_microbatches: int,
    global_tokens: int,
    hidden_size: int,
    split: PackSplit,
    seed: int = 0,
    steps: int | None = None,
    mix: Mix | None = None,
    max_pack_tokens: int | None = None,
    microbatch_multiple: int = 1,
) -> PackStats:
    """Plan steps as training does.

    Args:
        shapes: every sample of the manifest.
        data_parallel_size, num_microbatches, global_tokens, split: the run's.
        hidden_size: of the model, for the work of a sample.
        seed: of the order.
        steps: steps to plan; None plans one epoch.
        mix: how often samples are taken.
        max_pack_tokens, microbatch_multiple: see `assign_packs`.

    Raises:
        UserError: a sample is larger than a step.
    """
    tokens = [shape.tokens for shape in shapes]
    if max(tokens) > global_tokens:
        raise UserError(f"a sample has {max(tokens)} tokens, a step {global_tokens}; raise --data.global_tokens")
    sums = _Sums(data_parallel_size)
    state = SamplerState()
    while state.epoch == 0 and (steps is None or len(sums.ratios) < steps):
        plan = next_step(tokens, state, seed=seed, global_tokens=global_tokens, mix=mix)
        state = plan.state_after
        chosen = [tokens[sample] for sample in plan.samples]
        replicas = assign_packs(
            chosen,
            data_parallel_size=data_parallel_size,
            num_microbatches=num_microbatches,
            hidden_size=hidden_size,
            max_tokens=max_pack_tokens,
            microbatch_multiple=microbatch_multiple,
        )
        loads, computed, fullest = [], 0, 0
        for packs in replicas:
            loads.append(sum(sample_cost(chosen[place], hidden_size=hidden_size) for pack in packs for place in pack))
            for pack in packs:
                padded = split.share_tokens([shapes[plan.samples[place]] for place in pack]) * split.tp * split.cp
                computed += padded
                fullest = max(fullest, padded)
        sums.add(loads, samples=len(chosen), tokens=sum(chosen), computed=computed, fullest=fullest)
    return sums.stats()


def simulate_buckets(
    shapes: Sequence[SampleShape],
    sizes: Sequence[int],
    *,
    replicas: int,
    hidden_size: int,
    seed: int = 0,
    taken: Sequence[int] | None = None,
) -> PackStats:
    """One epoch of the published scheme: batches of one shape each, shuffled, `replicas` of them a step.

    A bucket's last batch may be short, and the last step may leave replicas idle: no sample is dropped, as in ours.

    Args:
        shapes: token counts of every sample.
        sizes: samples of a batch of each sample's bucket.
        replicas: data-parallel replicas.
        hidden_size: of the model.
        seed: of the order of samples and batches.
        taken: samples of the epoch, by number; None takes each once.
    """
    generator = np.random.default_rng(seed)
    buckets: dict[tuple[int, tuple[int, int, int]], list[int]] = {}
    for sample in generator.permutation(range(len(shapes)) if taken is None else taken).tolist():
        buckets.setdefault((sizes[sample], shapes[sample].grid), []).append(sample)
    batches: list[tuple[int, int]] = []
    for (size, _), samples in buckets.items():
        tokens = shapes[samples[0]].tokens
        batches += [(len(samples[start : start + size]), tokens) for start in range(0, len(samples), size)]
    order: NDArray[np.int64] = generator.permutation(len(batches))
    sums = _Sums(replicas)
    for start in range(0, len(order), replicas):
        step = [batches[number] for number in order[start : start + replicas]]
        loads = [count * sample_cost(tokens, hidden_size=hidden_size) for count, tokens in step]
        total = sum(count * tokens for count, tokens in step)
        fullest = max(count * tokens for count, tokens in step)
        idle = [0.0] * (replicas - len(step))
        sums.add([*loads, *idle], samples=sum(count for count, _ in step), tokens=total, computed=total, fullest=fullest)
    return sums.stats()


def stats_of_run(config: RunConfig, manifest: Path, *, replicas: int, steps: int | None, buckets: bool) -> dict[str, Any]:
    """Simulate a run's packs over a manifest, ready for JSON.

    Args:
        config: the run.
        manifest: csv or parquet table of clips.
        replicas: data-parallel replicas.
        steps: steps to simulate; None takes an epoch.
        buckets: simulate the published bucket scheme too.

    Raises:
        UserError: no usable clip, or a resolution without published buckets.
    """
    data, parallel = config.data, config.parallel
    table = read_manifest(manifest)
    clips, unfit = plan_clips(table.clips, data=data, encoders=config.encoders, model=config.model)
    shapes = [SampleShape(text_tokens=clip.text_tokens, grid=clip.grid) for clip in clips]
    hidden, mix = config.model.hidden_size, mix_of(clips, data)
    packs = simulate_packs(
        shapes,
        data_parallel_size=replicas,
        num_microbatches=data.num_microbatches,
        global_tokens=data.global_tokens,
        hidden_size=hidden,
        split=PackSplit(tp=parallel.tensor_model_parallel_size, cp=parallel.context_parallel_size),
        seed=config.train.seed,
        steps=steps,
        mix=mix,
        max_pack_tokens=data.max_pack_tokens,
        microbatch_multiple=parallel.microbatch_multiple,
    )
    facts: dict[str, Any] = {
        "manifest": str(manifest),
        "clips": len({clip.clip.row for clip in clips}),
        "skipped": [{"row": row.row, "reason": row.reason} for row in (*table.skipped, *unfit)],
        "replicas": replicas,
        "packs": {**asdict(packs), "efficiency": packs.efficiency},
    }
    if buckets:
        ranks = parallel.context_parallel_size
        sizes = [published_batch(clip.resolution, clip.num_frames, context_ranks=ranks) for clip in clips]
        taken = epoch_order(len(clips), seed=config.train.seed, epoch=0, mix=mix).tolist()
        published = simulate_buckets(shapes, sizes, replicas=replicas, hidden_size=hidden, taken=taken)
        facts["buckets"] = {**asdict(published), "efficiency": published.efficiency}
        facts["gain"] = packs.efficiency / published.efficiency
    return facts


def render(facts: dict[str, Any]) -> None:
    """Print the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    columns = [name for name in ("packs", "buckets") if name in facts]
    table = Table("", *columns, title=f"{facts['clips']:,} clips of {facts['manifest']} on {facts['replicas']} replicas")
    for name, words, form in (
        ("steps", "steps", ",.0f"),
        ("tokens_per_replica", "tokens per replica and step", ",.0f"),
        ("imbalance_mean", "busiest / mean work, mean of steps", ".3f"),
        ("imbalance_p99", "busiest / mean work, p99", ".3f"),
        ("pad_share", "padding", ".4%"),
        ("fullest_pack_tokens", "tokens of the fullest pack", ",.0f"),
        ("efficiency", "share of the time that is work", ".1%"),
    ):
        table.add_row(words, *(format(facts[column][name], form) for column in columns))
    console = Console()
    console.print(table)
    if "gain" in facts:
        console.print(f"the same work in {1 / facts['gain']:.2f} of the buckets' time", highlight=False)
    if facts["skipped"]:
        first = facts["skipped"][0]
        console.print(
            f"{len(facts['skipped'])} rows are left out, the first: row {first['row']}, {first['reason']}", highlight=False, markup=False
        )

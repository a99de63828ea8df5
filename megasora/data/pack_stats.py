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
from megasora.data.plan import Mix, SamplerState, assign_packs, mix_of, next_step, plan_clips, sample_cost
from megasora.parallel.pack import PackSplit, SampleShape

BUCKET_BATCHES: dict[str, dict[int, int]] = {
    "256px": {1: 45, 33: 12, 65: 6, 97: 4, 129: 3},
    "768px": {1: 38, 33: 6, 65: 4, 97: 3, 129: 2},
}
"""Samples per GPU (256px) or per context group of 4 (768px) by longest frame count; Open-Sora 2.0 report, table 2, and its released
configs/diffusion/train (bucket_config)."""


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
    shapes: Sequence[SampleShape], frames: Sequence[int], *, batch_sizes: dict[int, int], replicas: int, hidden_size: int, seed: int = 0
) -> PackStats:
    """One epoch of the published scheme: batches of one shape each, shuffled, `replicas` of them a step.

    A bucket's last batch may be short, and the last step may leave replicas idle: no sample is dropped, as in ours.

    Args:
        shapes, frames: token counts and frame counts of every sample.
        batch_sizes: samples per batch by frame count.
        replicas: data-parallel replicas.
        hidden_size: of the model.
        seed: of the order of samples and batches.

    Raises:
        UserError: a frame count without a batch size.
    """
    unknown = sorted(set(frames) - batch_sizes.keys())
    if unknown:
        raise UserError(f"the bucket scheme has no batch size for {unknown} frames, only for {sorted(batch_sizes)}")
    generator = np.random.default_rng(seed)
    buckets: dict[tuple[int, tuple[int, int, int]], list[int]] = {}
    for sample in generator.permutation(len(shapes)).tolist():
        buckets.setdefault((frames[sample], shapes[sample].grid), []).append(sample)
    batches: list[tuple[int, int]] = []
    for (count, _), samples in buckets.items():
        size, tokens = batch_sizes[count], shapes[samples[0]].tokens
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
    if buckets and (data.resolution_mix or data.image_weight != 1 or data.video_weight != 1):
        raise UserError("the published buckets know no mix; leave out --buckets, or data.resolution_mix and the weights")
    if buckets and data.resolution not in BUCKET_BATCHES:
        raise UserError(f"there are no published buckets for {data.resolution}, only for {', '.join(BUCKET_BATCHES)}")
    table = read_manifest(manifest)
    clips, unfit = plan_clips(table.clips, data=data, encoders=config.encoders, model=config.model)
    shapes = [SampleShape(text_tokens=clip.text_tokens, grid=clip.grid) for clip in clips]
    hidden = config.model.hidden_size
    packs = simulate_packs(
        shapes,
        data_parallel_size=replicas,
        num_microbatches=data.num_microbatches,
        global_tokens=data.global_tokens,
        hidden_size=hidden,
        split=PackSplit(tp=parallel.tensor_model_parallel_size, cp=parallel.context_parallel_size),
        seed=config.train.seed,
        steps=steps,
        mix=mix_of(clips, data),
        max_pack_tokens=data.max_pack_tokens,
        microbatch_multiple=parallel.microbatch_multiple,
    )
    facts: dict[str, Any] = {
        "manifest": str(manifest),
        "clips": len(clips),
        "skipped": [{"row": row.row, "reason": row.reason} for row in (*table.skipped, *unfit)],
        "replicas": replicas,
        "packs": {**asdict(packs), "efficiency": packs.efficiency},
    }
    if buckets:
        frames = [clip.num_frames for clip in clips]
        published = simulate_buckets(shapes, frames, batch_sizes=BUCKET_BATCHES[data.resolution], replicas=replicas, hidden_size=hidden)
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

"""The layouts that are tried: TP x PP x VP x CP x ZeRO x recompute x micro-batches x precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast

from megasora.config.schema import Fp8, RunConfig

Recompute = Literal["none", "selective", "full", "count"]


@dataclass(frozen=True, kw_only=True)
class Space:
    """Which values are tried; None lets the planner choose."""

    tp: tuple[int, ...] = (1, 2, 4, 8)
    """Within the model's heads and an NVLink domain."""
    pp: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)
    vp: tuple[int, ...] = (1, 2, 3, 4)
    """Chunks of a stage; 1 is the plain schedule."""
    cp: tuple[int, ...] = (1, 2, 4, 8, 16)
    zero: tuple[int, ...] = (1, 2, 3)
    recompute: tuple[str, ...] = ("none", "selective", "half", "full")
    """half: every other block of each kind in full, the rest selective."""
    microbatches: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
    """Of a replica and step; with a pipeline at least its stages."""
    fp8: tuple[str, ...] = ("none",)
    """Formats of the linear layers; FP8 changes the numbers, so it is tried when asked for."""
    split: tuple[str, ...] = ("flops", "memory")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One point of the space."""

    tp: int
    pp: int
    vp: int
    cp: int
    zero: int
    recompute: str
    microbatches: int
    fp8: str
    split: str

    @property
    def ranks(self) -> int:
        """Of one replica."""
        return self.tp * self.pp * self.cp

    @property
    def name(self) -> str:
        """Short, for tables: TP2 PP4x2 CP4 Z1 sel M16; an axis of one rank is not told.

        Z is the ZeRO stage, M the micro-batches, PP4x2 two chunks on each of 4 stages, "mem" stages balanced by memory; recompute: keep
        (none), sel(ective), half, full.
        """
        axes = [f"TP{self.tp}"] if self.tp > 1 else []
        axes += [f"PP{self.pp}x{self.vp}" if self.vp > 1 else f"PP{self.pp}"] if self.pp > 1 else []
        axes += [f"CP{self.cp}"] if self.cp > 1 else []
        kept = {"none": "keep", "selective": "sel"}.get(self.recompute, self.recompute)
        rest = [f"Z{self.zero}", kept, f"M{self.microbatches}"]
        rest += ["mem"] if self.pp > 1 and self.split == "memory" else []
        return " ".join([*axes, *rest, *([] if self.fp8 == "none" else [f"FP8 {self.fp8}"])])

    def config(self, base: RunConfig) -> RunConfig:
        """The run in this layout."""
        model, full, half = base.model, self.recompute == "full", self.recompute == "half"
        chunks = self.pp * self.vp
        recompute = cast(Recompute, "selective" if half else self.recompute)
        parallel = replace(
            base.parallel,
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vp if self.vp > 1 else None,
            context_parallel_size=self.cp,
            zero_stage=cast(Literal[1, 2, 3], self.zero),
            recompute=recompute,
            recompute_double_blocks=-(-model.num_double_blocks // chunks // 2) if half and not full else 0,
            recompute_single_blocks=-(-model.num_single_blocks // chunks // 2) if half and not full else 0,
            offload=base.parallel.offload if full or half else "none",  # it takes the inputs of blocks recomputed in full
            pipeline_split=cast(Literal["flops", "memory"], self.split),
            pipeline_blocks=None,
            ulysses_size=None,
            context_parallel_backend="auto",
        )
        precision = replace(base.precision, fp8=cast(Fp8, self.fp8))
        data = replace(base.data, num_microbatches=self.microbatches, max_pack_tokens=None)
        return replace(base, parallel=parallel, precision=precision, data=data)


def layouts(space: Space, *, gpus: int, samples: int) -> Iterator[Layout]:
    """Every layout that divides the GPUs.

    Args:
        space: what is tried.
        gpus: of the job.
        samples: of a step: more micro-batches than a replica has samples are not tried.
    """
    for tp, pp, cp in ((t, p, c) for t in space.tp for p in space.pp for c in space.cp):
        if gpus % (tp * pp * cp):
            continue
        of_replica = max(1, -(-samples // (gpus // (tp * pp * cp))))
        for vp in (v for v in space.vp if pp > 1 or v == 1):
            for micro in _microbatches(space, pp=pp, vp=vp, most=of_replica):
                for zero in space.zero:
                    for recompute in space.recompute:
                        for fp8 in space.fp8:
                            for split in space.split if pp > 1 else space.split[:1]:
                                yield Layout(
                                    tp=tp, pp=pp, vp=vp, cp=cp, zero=zero, recompute=recompute, microbatches=micro, fp8=fp8, split=split
                                )


def _microbatches(space: Space, *, pp: int, vp: int, most: int) -> list[int]:
    """Numbers of micro-batches worth trying: multiples of the stages when interleaved, one sample each at most, and that number itself."""
    unit = pp if vp > 1 else 1
    rounded = {-(-number // unit) * unit for number in (*space.microbatches, most)}
    least = pp if pp > 1 else 1
    return sorted(number for number in rounded if number <= max(most, unit) and number >= min(least, max(most, unit)))

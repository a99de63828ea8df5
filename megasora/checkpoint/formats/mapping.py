"""From one format to another, row by row: which rows of which source tensors a target tensor is made of. Every row is used and made once.

A format is a table from its tensors to rows of canonical tensors (`rules`), so two formats compose into a table without anything between:
row orders that cancel are never applied, and a tensor that is the same in both stays a view of the source file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megasora.checkpoint.formats.canonical import canonical_shapes
from megasora.checkpoint.formats.rules import Format, Order, Rule, canonical_shapes_cached, rules_of, to_canonical_order, to_foreign_order
from megasora.checkpoint.tensors import Rows, TensorInfo, TensorReader, as_torch
from megasora.config.errors import UserError
from megasora.config.schema import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of rows of a source tensor, and the row orders to undo and to apply."""

    key: str
    start: int
    rows: int
    undo: Order = "same"
    apply: Order = "same"

    def read(self, source: Rows, *, head_dim: int) -> Rows:
        """The rows in their new order; a view where nothing is reordered."""
        part = source[self.start : self.start + self.rows]
        return to_foreign_order(to_canonical_order(part, order=self.undo, head_dim=head_dim), order=self.apply, head_dim=head_dim)

    def __str__(self) -> str:
        orders = [f"{name} {order}" for name, order in (("undo", self.undo), ("apply", self.apply)) if order != "same"]
        return f"{self.key}[{self.start}:{self.start + self.rows}]{' ' if orders else ''}{', '.join(orders)}"


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Rows [start, start + rows) of a canonical tensor and where they stand in the source."""

    start: int
    rows: int
    key: str
    position: int
    order: Order


def _sources(fmt: Format, model: ModelConfig) -> dict[str, list[_Source]]:
    """For every canonical tensor its runs in a format, in row order."""
    found: dict[str, list[_Source]] = {key: [] for key in canonical_shapes_cached(model)}
    for rule in rules_of(fmt, model):
        position = 0
        for part in rule.parts:
            found[part.key].append(_Source(start=part.start, rows=part.rows, key=rule.key, position=position, order=part.order))
            position += part.rows
    for runs in found.values():
        runs.sort(key=lambda run: run.start)
    return found


def compose(source: Format, target: Format, model: ModelConfig) -> dict[str, tuple[Segment, ...]]:
    """Every tensor of the target format as a stack of rows of source tensors."""
    sources = _sources(source, model)
    return {
        rule.key: tuple(
            segment for part in rule.parts for segment in _segments(sources[part.key], start=part.start, rows=part.rows, order=part.order)
        )
        for rule in rules_of(target, model)
    }


def _segments(runs: list[_Source], *, start: int, rows: int, order: Order) -> Iterator[Segment]:
    for run in runs:
        first, last = max(start, run.start), min(start + rows, run.start + run.rows)
        if first >= last:
            continue
        undo, apply = (run.order, order) if run.order != order else ("same", "same")
        whole = (first, last) == (run.start, run.start + run.rows) == (start, start + rows)
        assert whole or undo == apply == "same", f"rows of {run.key} are reordered and cut"  # the rules never do both
        yield Segment(key=run.key, start=run.position + first - run.start, rows=last - first, undo=undo, apply=apply)


def shapes_in(fmt: Format, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model in a format."""
    shapes = canonical_shapes(model)
    return {rule.key: (sum(part.rows for part in rule.parts), *shapes[rule.parts[0].key][1:]) for rule in rules_of(fmt, model)}


def check_complete(infos: Mapping[str, TensorInfo], *, fmt: Format, model: ModelConfig) -> None:
    """Every tensor of the model is there, with its shape, and nothing else.

    Raises:
        UserError: names what is missing, unknown or of another shape.
    """
    expected = shapes_in(fmt, model)
    missing, unknown = sorted(expected.keys() - infos.keys()), sorted(infos.keys() - expected.keys())
    if missing or unknown:
        raise UserError(
            f"{fmt} weights: {len(missing)} tensors are missing ({', '.join(missing[:3])}), "
            f"{len(unknown)} are unknown ({', '.join(key[:100] for key in unknown[:3])})"
        )
    for key, shape in expected.items():
        if infos[key].shape != shape:
            raise UserError(f"{fmt} weights: {key} has shape {infos[key].shape}, expected {shape}")


def stack(parts: list[Rows]) -> Rows:
    """Rows below each other; one part stays what it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read_segments(segments: tuple[Segment, ...], reader: TensorReader, *, head_dim: int) -> Rows:
    """The bytes of a target tensor."""
    return stack([segment.read(reader.rows(segment.key), head_dim=head_dim) for segment in segments])


class CanonicalReader:
    """Canonical tensors of a foreign file.

    Args:
        reader: the file.
        fmt: its format.
        model: its sizes.

    Raises:
        UserError: a tensor is missing, unknown or has another shape, or a fused tensor's parts differ in type.
    """

    def __init__(self, reader: TensorReader, *, fmt: Format, model: ModelConfig) -> None:
        self.reader, self.model = reader, model
        infos = reader.infos
        check_complete(infos, fmt=fmt, model=model)
        self.segments = compose(fmt, "megasora", model)
        self.shapes = canonical_shapes_cached(model)
        self.infos = {
            key: TensorInfo(dtype=common_dtype(key, segments, infos), shape=self.shapes[key]) for key, segments in self.segments.items()
        }

    def rows(self, key: str) -> Rows:
        """A canonical tensor's bytes."""
        return read_segments(self.segments[key], self.reader, head_dim=self.model.head_dim)

    def release(self, key: str) -> None:
        """Let the pages of its sources go."""
        for segment in self.segments[key]:
            self.reader.release(segment.key)

    def read(self, key: str) -> Tensor:
        """A canonical tensor, as torch's."""
        return as_torch(self.rows(key), self.infos[key])


def common_dtype(key: str, segments: tuple[Segment, ...], infos: Mapping[str, TensorInfo]) -> str:
    """The type all sources of a tensor have.

    Raises:
        UserError: they differ.
    """
    types = {segment.key: infos[segment.key].dtype for segment in segments}
    if len(set(types.values())) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in types.items())
        raise UserError(f"{key} would be made of different types ({listed}); add --dtype bf16 or fp32")
    return next(iter(types.values()))


def rule_table(fmt: Format, model: ModelConfig) -> Mapping[str, Rule]:
    """The rules of a format by tensor name."""
    return {rule.key: rule for rule in rules_of(fmt, model)}

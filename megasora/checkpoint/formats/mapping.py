"""Reads canonical tensors out of foreign ones and the other way round, tensor by tensor. Every tensor is used and every one is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from megasora.checkpoint.formats.rules import (
    Format,
    Part,
    Rule,
    canonical_shapes_cached,
    rules_of,
    to_canonical_order,
    to_foreign_order,
)
from megasora.config.errors import UserError
from megasora.config.schema import ModelConfig


class Reader(Protocol):
    """Where tensors come from."""

    def keys(self) -> list[str]:
        """Tensor names."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def read(self, key: str) -> Tensor:
        """A tensor."""
        ...


class CanonicalReader:
    """Canonical tensors of a foreign file.

    Args:
        reader: the file.
        fmt: its format.
        model: its sizes.

    Raises:
        UserError: a tensor is missing, unknown or has another shape.
    """

    def __init__(self, reader: Reader, *, fmt: Format, model: ModelConfig) -> None:
        self.reader, self.model = reader, model
        self.shapes = canonical_shapes_cached(model)
        self._sources: dict[str, list[tuple[Rule, int, Part]]] = {key: [] for key in self.shapes}
        expected: dict[str, tuple[int, ...]] = {}
        for rule in rules_of(fmt, model):
            position = 0
            for part in rule.parts:
                self._sources[part.key].append((rule, position, part))
                position += part.rows
            expected[rule.key] = (position, *self.shapes[rule.parts[0].key][1:])
        _compare(expected, {key: reader.shape(key) for key in reader.keys()}, fmt)

    def read(self, key: str) -> Tensor:
        """A canonical tensor."""
        pieces = sorted(self._sources[key], key=lambda source: source[2].start)
        rows = [
            to_canonical_order(self.reader.read(rule.key)[start : start + part.rows], order=part.order, head_dim=self.model.head_dim)
            for rule, start, part in pieces
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def _compare(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], fmt: str) -> None:
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise UserError(
            f"{fmt} weights: {len(missing)} tensors are missing ({', '.join(missing[:3])}), "
            f"{len(unknown)} are unknown ({', '.join(unknown[:3])})"
        )
    for key, shape in expected.items():
        if found[key] != shape:
            raise UserError(f"{fmt} weights: {key} has shape {found[key]}, expected {shape}")


def foreign_tensors(read: Callable[[str], Tensor], *, fmt: Format, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a model in a format, from a function that reads canonical tensors."""
    for rule in rules_of(fmt, model):
        rows = [
            to_foreign_order(read(part.key)[part.start : part.start + part.rows], order=part.order, head_dim=model.head_dim)
            for part in rule.parts
        ]
        yield rule.key, rows[0] if len(rows) == 1 else torch.cat(rows)

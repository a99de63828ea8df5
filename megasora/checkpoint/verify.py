"""Proof of a conversion: the inverse is replayed on the target and compared with the source, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megasora.checkpoint.conversion_plan import Plan
from megasora.checkpoint.convert import manifest_of, sha256_of
from megasora.checkpoint.formats.mapping import compose, read_segments
from megasora.checkpoint.source import open_source
from megasora.config.errors import UserError
from megasora.config.io import from_dict
from megasora.config.schema import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What a verification found; every number counts tensors."""

    target_hashes: int
    """Target tensors whose bytes are those of the manifest."""
    inverted: int
    """Source tensors that the target gives back bit for bit."""
    replayed: int
    """Edited or cast target tensors that were made again from the source, bit for bit."""
    unproved: tuple[str, ...]
    """Tensors that need the source for a proof, and it was not there."""


def verify(target: Path, *, plan: Plan | None, options: Mapping[str, Any] | None = None, workers: int = 2) -> Proof:
    """Prove a finished conversion.

    Args:
        target: what `convert` wrote.
        plan: the conversion's plan over the source; None when the source is gone, then hashes in the manifest stand for it.
        options: the flags of the plan, compared with the manifest's.
        workers: threads.

    Raises:
        UserError: a tensor differs, or the target was made with other flags.
    """
    facts = manifest_of(target)
    if options is not None and dict(options) != facts["options"]:
        raise UserError(f"{target} was made with {facts['options']}, not {dict(options)}")
    if plan is not None and plan.source.fmt != facts["source"]["format"]:
        raise UserError(f"{target} was made from {facts['source']['format']} weights, not {plan.source.fmt}")
    model: ModelConfig = from_dict(facts["target"]["model"], ModelConfig, path=str(target))
    made = open_source(target, fmt=facts["target"]["format"], axes_dim=model.axes_dim)
    with ThreadPoolExecutor(workers) as pool:
        hashes = dict(zip(facts["tensors"], pool.map(lambda key: sha256_of(made.reader.rows(key)), facts["tensors"]), strict=True))
        wrong = [key for key, found in hashes.items() if found != facts["tensors"][key]["sha256"]]
        if wrong:
            raise UserError(f"{target}: {len(wrong)} tensors are not the ones that were written, the first {wrong[0]}")
        exact, edited = _split(facts, model)
        bad = [
            key for key, good in zip(exact, pool.map(lambda key: _inverts(key, exact, made, facts, plan), exact), strict=True) if not good
        ]
        if bad:
            raise UserError(f"{target}: {len(bad)} source tensors do not come back bit for bit, the first {bad[0]}")
        if plan is None:
            return Proof(target_hashes=len(hashes), inverted=len(exact), replayed=0, unproved=tuple(edited))
        bad = [key for key in edited if sha256_of(plan.rows(plan.targets[key])) != hashes[key]]
        if bad:
            raise UserError(f"{target}: {len(bad)} edited tensors cannot be made again from the source, the first {bad[0]}")
    return Proof(target_hashes=len(hashes), inverted=len(exact), replayed=len(edited), unproved=())


def _split(facts: Mapping[str, Any], model: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """(source tensors the target determines, with their rows; target tensors that were edited or cast)."""
    edited = [key for key, entry in facts["tensors"].items() if entry["edits"]]
    inverse = compose(facts["target"]["format"], facts["source"]["format"], model)
    marked = set(edited)
    exact = {
        key: segments
        for key, segments in inverse.items()
        if key in facts["source_tensors"] and key not in facts["dropped"] and not any(segment.key in marked for segment in segments)
    }
    return exact, edited


def _inverts(key: str, exact: Mapping[str, Any], made: Any, facts: Mapping[str, Any], plan: Plan | None) -> bool:
    rows = read_segments(exact[key], made.reader, head_dim=made.model.head_dim)
    if plan is not None and not np.array_equal(rows.reshape(-1), plan.source.reader.rows(key).reshape(-1)):
        return False
    return sha256_of(rows) == facts["source_tensors"][key]["sha256"]

"""Converts weights tensor by tensor: bounded memory, several threads, resumable, with a hash of every tensor read and written.

Work goes into a hidden folder beside the target, with a journal of what is safely on disk; the target gets its name when all of it is.
Tensors that share rows (a fused matrix and its parts) are one unit, so each source tensor is read and hashed once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megasora import __version__
from megasora.checkpoint import manifests
from megasora.checkpoint.conversion_plan import Plan
from megasora.checkpoint.outputs import JOURNAL, MegatronOutput, Output, Place, SafetensorsOutput
from megasora.checkpoint.tensors import Rows
from megasora.config.errors import UserError
from megasora.config.files import refuse_existing
from megasora.config.io import to_dict

SHARD_BYTES = 10_000_000_000
"""Most bytes of a shard (diffusers' default max_shard_size, "10GB")."""
SYNC_BYTES = 512 << 20
"""A worker makes what it wrote durable, and its journal with it, at least this often."""
OnProgress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Tensors that share rows."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    num_bytes: int
    """Of the targets."""


@dataclass
class Progress:
    """What has been done, by tensor."""

    sources: dict[str, str] = field(default_factory=dict)
    """SHA-256 of source tensors."""
    targets: dict[str, str] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)


def sha256_of(rows: Rows) -> str:
    """Hash of a tensor's bytes."""
    return hashlib.sha256(rows.reshape(-1).data).hexdigest()


def units_of(plan: Plan) -> list[Unit]:
    """The plan's targets and sources, grouped by shared rows, in the order of the source."""
    group: dict[str, int] = {}
    members: dict[int, tuple[list[str], list[str]]] = {}
    for number, target in enumerate(plan.targets.values()):
        sources, targets = list[str](), [target.key]
        for joined in {group[key] for key in target.reads if key in group}:
            old_sources, old_targets = members.pop(joined)
            sources += old_sources
            targets = old_targets + targets
        sources += [key for key in target.reads if key not in sources]
        members[number] = (sources, targets)
        group.update(dict.fromkeys(sources, number))
    infos = plan.source.reader.infos
    order = {key: position for position, key in enumerate(infos)}
    units = [
        Unit(sources=tuple(sources), targets=tuple(targets), num_bytes=sum(plan.targets[key].info.num_bytes for key in targets))
        for sources, targets in members.values()
    ]
    units += [Unit(sources=(key,), targets=(), num_bytes=0) for key in plan.dropped if key not in group]
    return sorted(units, key=lambda unit: min((order[key] for key in unit.sources), default=-1))


def deal(units: list[Unit], workers: int) -> list[list[Unit]]:
    """Units for each worker, near-equal in bytes, each worker's in source order."""
    shares: list[list[Unit]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for unit in units:
        worker = loads.index(min(loads))
        shares[worker].append(unit)
        loads[worker] += unit.num_bytes
    return shares


def convert(
    plan: Plan,
    target: Path,
    *,
    options: Mapping[str, Any],
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Write the target of a plan, or go on with an interrupted conversion of the same plan.

    Args:
        plan: what to write.
        target: a .safetensors file, or a folder (of shards, or of a distributed checkpoint for format megasora).
        options: the flags that shaped the plan, for the manifest.
        workers: threads; None takes the machine's cores, at most 4.
        shard_bytes: most bytes of a shard of a folder.
        on_start: told (bytes already done, bytes in all).
        on_progress: told the bytes of every finished unit.

    Returns:
        The manifest.

    Raises:
        UserError: the target exists, another conversion writes it, or the disk is too full.
    """
    workers = workers or min(4, os.cpu_count() or 1)
    single = target.suffix == ".safetensors"
    if plan.target_format == "megasora" and single:
        raise UserError(f"{target}: a distributed checkpoint is a folder; leave out .safetensors")
    refuse_existing(target, cure="remove it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(exist_ok=True)
    identity = _identity(plan, options, workers=workers, shard_bytes=shard_bytes, single=single)
    with _locked(partial, target) as journal:
        done = _journaled(journal, identity, partial)
        _check_space(plan, done, target)
        if on_start is not None:
            on_start(sum(plan.targets[key].info.num_bytes for key in done.targets), plan.num_bytes)
        output = _output(plan, partial, single=target.name if single else None, workers=workers, shard_bytes=shard_bytes, done=done)
        _run(plan, output, journal, done, workers=workers, on_progress=on_progress)
        facts = _manifest(plan, target, done, options)
        output.finish(done.places, facts)
    _publish(partial, target, single=single)
    return facts


def _identity(plan: Plan, options: Mapping[str, Any], *, workers: int, shard_bytes: int, single: bool) -> str:
    """Hash of everything an interrupted conversion must have in common to go on."""
    path = plan.source.path
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stamps = [[str(file.relative_to(path.parent)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    targets = {key: [str(target.info), target.describe(), target.edits] for key, target in plan.targets.items()}
    facts = [__version__, stamps, plan.source.fmt, plan.target_format, targets, dict(options), workers, shard_bytes, single]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def _locked(partial: Path, target: Path) -> Iterator[Path]:
    """The journal, held by this process alone."""
    journal = partial / JOURNAL
    descriptor = os.open(journal, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another conversion is writing {target}; wait for it, or choose another name") from None
        yield journal
    finally:
        os.close(descriptor)


def _journaled(journal: Path, identity: str, partial: Path) -> Progress:
    """What the journal of the same plan says is done; anything else starts over."""
    done = Progress()
    lines = journal.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        same = json.loads(lines[0])["identity"] == identity
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        for path in partial.iterdir():
            if path.name != JOURNAL:
                path.unlink()
        with journal.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"identity": identity}) + "\n")
        return done
    kept = [lines[0]]
    for line in lines[1:-1]:  # the text after the last newline is empty, or was cut off
        try:
            entry = json.loads(line)
        except ValueError:
            break
        kept.append(line)
        done.sources.update(entry["sources"])
        done.targets.update(entry["targets"])
        done.places.update(entry["places"])
    journal.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return done


def _check_space(plan: Plan, done: Progress, target: Path) -> None:
    needed = sum(item.info.num_bytes for key, item in plan.targets.items() if key not in done.targets)
    free = shutil.disk_usage(target.parent).free
    if needed + (64 << 20) > free:
        raise UserError(
            f"{target} needs {needed / 1e9:.1f} GB more, {target.parent} has {free / 1e9:.1f} GB free; make room and run it again"
        )


def _output(plan: Plan, partial: Path, *, single: str | None, workers: int, shard_bytes: int, done: Progress) -> Output:
    infos = {key: target.info for key, target in plan.targets.items()}
    if plan.target_format == "megasora":
        return MegatronOutput(partial, infos, model=plan.model, workers=workers, places=done.places)
    return SafetensorsOutput(
        partial,
        infos,
        fmt=plan.target_format,
        model=plan.model,
        single=single,
        shard_bytes=shard_bytes,
        keep=bool(done.targets),
    )


class _Crew:
    """The threads of a conversion: they stop together, and what each has safely written is in the journal."""

    def __init__(self, plan: Plan, output: Output, journal: Path, done: Progress, on_progress: OnProgress | None) -> None:
        self.plan, self.output, self.done, self.on_progress = plan, output, done, on_progress
        self.journal = journal.open("a", encoding="utf-8")
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.errors: list[BaseException] = []

    def work(self, worker: int, units: list[Unit]) -> None:
        """Do a worker's units."""
        pending: list[tuple[Unit, dict[str, Any]]] = []
        try:
            for unit in units:
                if self.stop.is_set():
                    break
                pending.append((unit, self._convert(unit, worker)))
                if sum(unit.num_bytes for unit, _ in pending) >= SYNC_BYTES:
                    self._settle(pending, worker)
            self._settle(pending, worker)
        except BaseException as error:  # noqa: BLE001 (handed to the thread that waits)
            self.errors.append(error)
            self.stop.set()

    def _convert(self, unit: Unit, worker: int) -> dict[str, Any]:
        reader = self.plan.source.reader
        hashes = {key: sha256_of(reader.rows(key)) for key in unit.sources}
        entry: dict[str, Any] = {"sources": hashes, "targets": {}, "places": {}}
        for key in unit.targets:
            target = self.plan.targets[key]
            rows = self.plan.rows(target)
            entry["places"][key] = self.output.write(key, rows, worker=worker)
            whole = len(unit.sources) == len(unit.targets) == 1 and not target.edits
            same = whole and target.segments[0].undo == target.segments[0].apply == "same"
            entry["targets"][key] = hashes[unit.sources[0]] if same else sha256_of(rows)
        for key in unit.sources:
            reader.release(key)
        if self.on_progress is not None:
            self.on_progress(unit.num_bytes)
        return entry

    def _settle(self, pending: list[tuple[Unit, dict[str, Any]]], worker: int) -> None:
        """Make finished units durable and write them down."""
        self.output.sync(worker)
        with self.lock:
            for _, entry in pending:
                self.journal.write(json.dumps(entry) + "\n")
                self.done.sources.update(entry["sources"])
                self.done.targets.update(entry["targets"])
                self.done.places.update(entry["places"])
            self.journal.flush()
            os.fsync(self.journal.fileno())
        pending.clear()


def _run(plan: Plan, output: Output, journal: Path, done: Progress, *, workers: int, on_progress: OnProgress | None) -> None:
    shares = [
        [
            unit
            for unit in share
            if any(key not in done.targets for key in unit.targets) or any(key not in done.sources for key in unit.sources)
        ]
        for share in deal(units_of(plan), workers)
    ]
    crew = _Crew(plan, output, journal, done, on_progress)
    with _fast_saves():
        threads = [threading.Thread(target=crew.work, args=(worker, share), daemon=True) for worker, share in enumerate(shares)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        except BaseException:
            crew.stop.set()
            for thread in threads:
                thread.join()
            output.abandon()
            raise
        finally:
            crew.journal.close()
    if crew.errors:
        output.abandon()
        raise crew.errors[0]


@contextmanager
def _fast_saves() -> Iterator[None]:
    """torch.save without the archive's CRC (every tensor has a SHA-256) and without its warning about read-only memory."""
    import torch

    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            yield
    finally:
        torch.serialization.set_crc32_options(before)


def _manifest(plan: Plan, target: Path, done: Progress, options: Mapping[str, Any]) -> dict[str, Any]:
    infos = plan.source.reader.infos
    missing = [key for key in plan.targets if key not in done.targets]
    if missing:
        raise UserError(f"{len(missing)} tensors were not written, the first {missing[0]}")
    return {
        "format": "megasora-conversion",
        "megasora": __version__,
        "source": {"name": plan.source.path.name, "format": plan.source.fmt, "model": to_dict(plan.source.model)},
        "target": {"name": target.name, "format": plan.target_format, "model": to_dict(plan.model)},
        "options": dict(options),
        "notes": plan.notes,
        "dropped": plan.dropped,
        "tensors": {
            key: {
                "dtype": item.info.dtype,
                "shape": list(item.info.shape),
                "sha256": done.targets[key],
                "rows_of": item.describe(),
                "edits": list(item.edits),
            }
            for key, item in plan.targets.items()
        },
        "source_tensors": {
            key: {"dtype": info.dtype, "shape": list(info.shape), "sha256": done.sources[key]} for key, info in infos.items()
        },
    }


def _publish(partial: Path, target: Path, *, single: bool) -> None:
    """Give the finished target its name."""
    (partial / JOURNAL).unlink()
    if single:
        manifest = f"{target.name}.{manifests.NAME}"
        (partial / manifest).replace(target.with_name(manifest))
        (partial / target.name).replace(target)
        partial.rmdir()
    else:
        partial.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def manifest_of(target: Path) -> dict[str, Any]:
    """The manifest of a converted target.

    Raises:
        UserError: there is none.
    """
    path = target.with_name(f"{target.name}.{manifests.NAME}") if target.is_file() else target / manifests.NAME
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts["tensors"], dict) or not isinstance(facts["source_tensors"], dict):
            raise ValueError("it lists no tensors")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{target} has no manifest of a conversion at {path} ({error})") from error
    return facts

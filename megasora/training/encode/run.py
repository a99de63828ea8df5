"""Every planned clip decoded and encoded once, exactly as training would, into shards that training reads.

The folder gets `cache.json` (what it was made from), `null.safetensors` (the empty text), `unplanned.jsonl` (rows that fit no shape) and
the shards. Shards are dealt out to tasks whole, so their bytes do not depend on how many tasks there were; finished ones are left alone.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from megasora.config.array_task import task_of
from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.data.cache.identity import PARTS
from megasora.data.cache.layout import CacheSize, readable_bytes
from megasora.data.cache.shards import remove_leftovers, shard_name
from megasora.data.decoding.choice import open_decoder
from megasora.data.decoding.contract import Decoder
from megasora.data.manifest import read_manifest
from megasora.models.encoders.bundle import load_encoders
from megasora.training.encode.clip_ranks import ClipRanks
from megasora.training.encode.maker import ShardMaker
from megasora.training.encode.plan import EncodePlan, plan_encode
from megasora.training.encode.record import CacheRecord
from megasora.training.encode.settings import EncodeResult, EncodeSettings, OnProgress


def run_encode(
    config: RunConfig,
    settings: EncodeSettings,
    *,
    on_progress: OnProgress | None = None,
    on_start: Callable[[CacheSize], None] | None = None,
) -> EncodeResult:
    """Encode this task's shards; finished ones are skipped.

    Args:
        config: the run that will train; tiny makes its own clips and encoders in the folder when none are given.
        settings: what is stored, and where.
        on_progress: told about every finished clip, on the first of a task's ranks.
        on_start: told the size before anything is decoded, on the first of a task's ranks.

    Returns:
        The same on all ranks of a task.

    Raises:
        UserError: settings, files, disk or an earlier cache in the folder do not allow it.
    """
    ranks = ClipRanks.start(config, shares=settings.store != "text" and config.encoders.parallel != "none")
    folder = settings.output
    with disk_errors(folder):
        if ranks.leads:
            folder.mkdir(parents=True, exist_ok=True)
        config = ranks.agreed(lambda: _with_tiny_assets(config, folder=folder / "assets"))
        plan = plan_encode(config, settings)
        if ranks.leads:
            return ranks.agreed(lambda: _lead(plan, settings, ranks, on_progress=on_progress, on_start=on_start))
        _follow(plan, ranks)
    result: EncodeResult | None = ranks.agreed(lambda: None)
    assert result is not None, "the first rank has it"
    return result


def _follow(plan: EncodePlan, ranks: ClipRanks) -> None:
    """Do what another rank than the first does."""
    todo: list[int] | None = ranks.agreed(lambda: None)
    if todo:
        encoders = load_encoders(plan.config.encoders, model=plan.config.model, device=ranks.device, parts=("vae",))
        ShardMaker(plan, Path(), encoders=encoders, decoder=None, ranks=ranks).follow(todo)


def _lead(
    plan: EncodePlan,
    settings: EncodeSettings,
    ranks: ClipRanks,
    *,
    on_progress: OnProgress | None,
    on_start: Callable[[CacheSize], None] | None,
) -> EncodeResult:
    """Do what a task's first rank does."""
    started, folder = time.monotonic(), settings.output
    task, tasks = task_of(settings.shard, os.environ)
    if on_start is not None:
        on_start(plan.size)
    own = range(task, plan.settings.num_shards, tasks)
    remove_leftovers(folder, own)
    record = CacheRecord(plan, folder)
    todo = ranks.agreed(lambda: [shard for shard in own if not record.is_finished(shard, verify=settings.verify)])
    failed, bytes_written = _make(plan, folder, record, todo, ranks=ranks, on_progress=on_progress) if todo else (0, 0)
    others = [shard for shard in range(plan.settings.num_shards) if shard % tasks != task]
    missing = tuple(shard for shard in others if not (folder / f"{shard_name(shard)}.json").exists())
    return EncodeResult(
        output=str(folder),
        size=plan.size,
        made=tuple(todo),
        kept=tuple(shard for shard in own if shard not in set(todo)),
        missing=missing,
        samples=sum(len(plan.samples_of(shard)) for shard in todo),
        failed=failed,
        unplanned=len(plan.unplanned),
        bytes_written=bytes_written,
        seconds=time.monotonic() - started,
    )


def _make(
    plan: EncodePlan, folder: Path, record: CacheRecord, shards: Sequence[int], *, ranks: ClipRanks, on_progress: OnProgress | None
) -> tuple[int, int]:
    """Load what encodes and make the shards; returns (failed clips, bytes written)."""
    refuse_full_disk(folder, sum(plan.size.shard_bytes[shard] for shard in shards))
    config = plan.config
    device = ranks.device
    decoder: Decoder | None = None
    if plan.settings.has_latents:
        data = config.data
        decoder = open_decoder(data.decoder, device=device, workers=data.decode_workers, timeout_s=data.decode_timeout_s)
    encoders = load_encoders(config.encoders, model=config.model, device=device, parts=plan.encoders_needed)
    record.begin(encoders, decoder=None if decoder is None else decoder.identity)
    maker = ShardMaker(plan, folder, encoders=encoders, decoder=decoder, ranks=ranks)
    maker.make(shards, on_progress=on_progress)
    return maker.failed, maker.bytes_written


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Refuse shards that do not fit.

    Raises:
        UserError: says what they need, in bytes, and what there is.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the shards to write need {readable_bytes(needed)}, {folder} has {readable_bytes(free)} free; give another --output"
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """What the operating system refuses, as one line; finished shards stay."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or folder}: {error.strerror or error}"
        raise UserError(f"cannot write the cache ({what}); finished shards are kept, the same command goes on") from error


def _with_tiny_assets(config: RunConfig, *, folder: Path) -> RunConfig:
    """The config with the clips and encoders that `megasora train tiny` would make in this folder, where it leaves them open."""
    if config.recipe != "tiny":
        return config
    from megasora.data.tiny_clips import make_tiny_clips
    from megasora.models.encoders.tiny import make_tiny_encoders

    if config.data.manifest is None:
        train, evaluation = make_tiny_clips(folder / "clips")
        config = replace(config, data=replace(config.data, manifest=str(train), eval_manifest=str(evaluation)))
    if all(getattr(config.encoders, name) is None for name in PARTS):
        captions = [clip.text for clip in read_manifest(str(config.data.manifest)).clips]
        config = replace(
            config, encoders=make_tiny_encoders(folder / "encoders", captions=captions, model=config.model, base=config.encoders)
        )
    return config

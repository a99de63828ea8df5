"""Reads and writes the pyramid's tables: streaming, resumable, complete or not there.

While a stage runs, finished rows go to small parts in `<output>.parts/`; a run that was interrupted reads them and goes on. At the end the
parts are merged in the order of the input, whatever order the workers finished in, so the table does not depend on how many there were.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from pyarrow import csv, parquet

from megasora.config.errors import UserError
from megasora.config.files import refuse_existing, written_whole
from megasora.curation.columns import PROBE
from megasora.curation.pool import Outcome, Row, Work, outcomes
from megasora.curation.settings import Limits

METADATA_KEY = b"megasora"
"""Where a table says which stage wrote it, with which settings."""
_PART_ROWS = 512
_PART_SECONDS = 20.0
"""A part is written after so many rows or so much time: what an interruption can cost."""

OnProgress = Callable[[int, int | None, int], None]
"""Called with (rows done, rows in all, rows failed)."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a stage did."""

    output: str
    rows_in: int
    rows_out: int
    failed: int
    """Input rows that came to nothing but a reason."""
    resumed: int
    """Input rows that an earlier, interrupted run had done."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pass over a table: what is done to each row and what the result looks like."""

    name: str
    work: Work
    on_failure: Callable[[Row, str], Row]
    """Makes the row that stands for one whose work failed."""
    schema: pa.Schema
    settings: dict[str, Any]
    """What the result depends on, as JSON values; a run with other settings does not go on from this one's parts."""


def table_schema(path: Path) -> pa.Schema:
    """Schema of a parquet table.

    Raises:
        UserError: it is no readable parquet file.
    """
    try:
        return parquet.read_schema(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable parquet table: {str(error).splitlines()[0]}") from error


def clip_schema(path: Path) -> pa.Schema:
    """Schema of a table of clips: any that `probe` or a later stage wrote.

    Raises:
        UserError: it is none.
    """
    schema = table_schema(path)
    lacking = [name for name in PROBE.names if name not in schema.names]
    if lacking:
        raise UserError(f"{path} lacks the columns {', '.join(lacking)}; make it with megasora data probe, shots and score")
    return schema


def table_rows(path: Path, *, batch_rows: int = 4096) -> Iterator[Row]:
    """Rows of a parquet table, streamed."""
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=batch_rows):
            yield from batch.to_pylist()


def any_table_rows(path: Path) -> list[Row]:
    """Rows of a csv or parquet table that a user gives.

    A csv row with another number of cells refuses the table, unlike in a manifest: it is a list that was written by hand and nothing was
    spent on it yet, while a row that is left out here would be missing from every table and every count after it.

    Raises:
        UserError: it cannot be read, or a row has a cell too many or too few.
    """
    if path.suffix == ".parquet":
        table_schema(path)
        return list(table_rows(path))
    wrong: list[csv.InvalidRow] = []

    def collect(row: csv.InvalidRow) -> str:
        wrong.append(row)
        return "skip"

    try:
        # without threads pyarrow knows the numbers of rows; 1 is the header
        one = csv.ReadOptions(use_threads=False)
        parse = csv.ParseOptions(newlines_in_values=True, invalid_row_handler=collect)
        rows: list[Row] = csv.read_csv(path, read_options=one, parse_options=parse).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable csv or parquet table: {str(error).splitlines()[0]}") from error
    if wrong:
        first, more = wrong[0], f" (and {len(wrong) - 1} more such rows)" if len(wrong) > 1 else ""
        cells = f"row {first.number - 2} has {first.actual_columns} cells instead of {first.expected_columns}{more}"
        raise UserError(f"{path}: {cells}; put cells that contain commas in quotes")
    return rows


def with_columns(schema: pa.Schema, *more: pa.Field) -> pa.Schema:
    """`schema` with the fields of `more` replaced or added at the end."""
    names = {field.name for field in more}
    return pa.schema([*(field for field in schema if field.name not in names), *more])


def metadata_of(schema: pa.Schema) -> dict[str, Any]:
    """What the stage that wrote a table says about it; empty for a foreign table."""
    raw = (schema.metadata or {}).get(METADATA_KEY)
    return json.loads(raw) if raw else {}


def write_table(path: Path, batches: Iterable[pa.RecordBatch], *, schema: pa.Schema) -> int:
    """Write a parquet table that appears under its name only when complete; returns its rows."""
    rows = 0
    with written_whole(path, sync=True) as temporary, parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch.cast(schema))
            rows += batch.num_rows
    return rows


def run_over_table(
    stage: Stage, source: Path, *, output: Path, limits: Limits, overwrite: bool = False, on_progress: OnProgress | None = None
) -> Summary:
    """`run_stage` over every row of a parquet table."""
    total = parquet.read_metadata(source).num_rows
    return run_stage(stage, table_rows(source), total=total, output=output, limits=limits, overwrite=overwrite, on_progress=on_progress)


def run_stage(
    stage: Stage,
    rows: Sequence[Row] | Iterator[Row],
    *,
    total: int | None,
    output: Path,
    limits: Limits,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Summary:
    """Work on every row and write the table.

    Args:
        stage: what to do.
        rows: input rows, each with a unique `id`.
        total: how many, for the progress.
        output: parquet file to write.
        limits: worker processes.
        overwrite: replace a table that is there.
        on_progress: told about every finished row.

    Raises:
        UserError: the output cannot be written or holds something else, an id occurs twice, or the work refused.
    """
    started = time.monotonic()
    if problem := limits.problems():
        raise UserError(problem)
    identity = _identity(stage)
    _check_output(output, overwrite=overwrite)
    parts = _Parts(output.with_name(f"{output.name}.parts"), identity=identity, schema=stage.schema, fresh=overwrite)
    run = _Run(stage, parts, total=total, on_progress=on_progress)
    try:
        for outcome in outcomes(stage.work, run.undone(rows), limits=limits):
            run.finish(outcome)
    finally:
        parts.flush()  # also when interrupted: what is done stays done
    if not run.order:
        raise UserError(f"there is nothing to {stage.name}: the input has no row")
    metadata = {METADATA_KEY: json.dumps({"stage": stage.name, "settings": stage.settings}, sort_keys=True).encode()}
    written = parts.merge(output, order=run.order, metadata=metadata)
    return Summary(
        output=str(output),
        rows_in=len(run.order),
        rows_out=written,
        failed=run.failed,
        resumed=run.resumed,
        seconds=time.monotonic() - started,
    )


class _Run:
    """The rows of a run that are out at work, and the counts of those that are done."""

    def __init__(self, stage: Stage, parts: _Parts, *, total: int | None, on_progress: OnProgress | None) -> None:
        self._stage, self._parts, self._total, self._on_progress = stage, parts, total, on_progress
        self._pending: dict[str, Row] = {}
        self._done = 0
        self.failed = self.resumed = 0
        self.order: dict[str, int] = {}
        """Key of every input row seen -> its number."""

    def undone(self, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
        """(key, row) of the rows that no earlier run did.

        Raises:
            UserError: an id occurs twice.
        """
        for row in rows:
            key = str(row["id"])
            if key in self.order:
                raise UserError(f"the id {key!r} occurs twice (rows {self.order[key]} and {len(self.order)}); give every row its own")
            self.order[key] = len(self.order)
            if key in self._parts.done:
                self.resumed += 1
                self._count(failed=self._parts.done[key])
                continue
            self._pending[key] = row
            yield key, row

    def finish(self, outcome: Outcome) -> None:
        """Keep what came of a row."""
        row = self._pending.pop(outcome.key)
        results = list(outcome.rows) if not outcome.reason else [self._stage.on_failure(row, outcome.reason)]
        failed = any(result.get("error") or result.get("score_error") for result in results)
        self._parts.add(outcome.key, results, failed=failed)
        self._count(failed=failed)

    def _count(self, *, failed: bool) -> None:
        self.failed += failed
        self._done += 1
        if self._on_progress is not None:
            self._on_progress(self._done, self._total, self.failed)


class _Parts:
    """Finished rows of a run, in small parquet files beside the output."""

    def __init__(self, folder: Path, *, identity: str, schema: pa.Schema, fresh: bool) -> None:
        self.folder = folder
        self.schema = pa.schema([*schema, pa.field("_key", pa.string()), pa.field("_item", pa.int32()), pa.field("_failed", pa.bool_())])
        self.result_schema = schema
        self.done: dict[str, bool] = {}
        """Keys that are done, and whether they failed."""
        self._rows: list[Row] = []
        self._written = time.monotonic()
        self._number = 0
        marker = folder / "settings.sha256"
        if fresh and folder.exists():
            shutil.rmtree(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if marker.exists() and marker.read_text() != identity:
                raise UserError(f"{folder} holds rows of a run with other settings; remove it, or give --overwrite to begin anew")
            marker.write_text(identity)
            for path in sorted(folder.glob("part-*.parquet")):
                self._number = int(path.stem.removeprefix("part-")) + 1
                table = parquet.read_table(path, columns=["_key", "_failed"])
                self.done.update(zip(table["_key"].to_pylist(), table["_failed"].to_pylist(), strict=True))
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{folder}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}") from error

    def add(self, key: str, rows: Sequence[Row], *, failed: bool) -> None:
        """Remember the results of a row; now and then they are written."""
        self._rows += [{**row, "_key": key, "_item": number, "_failed": failed} for number, row in enumerate(rows)]
        if len(self._rows) >= _PART_ROWS or time.monotonic() - self._written > _PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is remembered."""
        if self._rows:
            table = pa.Table.from_pylist(self._rows, schema=self.schema)
            write_table(self.folder / f"part-{self._number:06d}.parquet", table.to_batches(), schema=self.schema)
            self._number += 1
            self._rows = []
        self._written = time.monotonic()

    def merge(self, output: Path, *, order: dict[str, int], metadata: dict[bytes, bytes]) -> int:
        """Write the output in the input's order and remove the parts; returns its rows. Works out of core."""
        wanted = pa.table({"_key": pa.array(order.keys(), pa.string()), "_number": pa.array(order.values(), pa.int64())})
        schema = self.result_schema.with_metadata(metadata)
        with duckdb.connect() as connection:
            connection.register("wanted", wanted)
            columns = ", ".join(f'parts."{name}"' for name in schema.names)
            found = connection.sql(
                f"SELECT {columns} FROM read_parquet($glob) AS parts JOIN wanted USING (_key) ORDER BY _number, _item",
                params={"glob": str(self.folder / "part-*.parquet")},
            )
            rows = write_table(output, _typed(found.to_arrow_reader(65_536), schema), schema=schema)
        shutil.rmtree(self.folder)
        return rows


def _typed(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """DuckDB gives fixed-size binary back as binary; cast each column to what it was."""
    for batch in batches:
        yield pa.RecordBatch.from_arrays(
            [column.cast(field.type) for column, field in zip(batch.columns, schema, strict=True)], schema=schema
        )


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.suffix != ".parquet":
        raise UserError(f"--output {output} must end in .parquet")
    if not overwrite:
        refuse_existing(output, cure="give --overwrite or another name")
    if not output.parent.is_dir():
        try:
            output.parent.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {output.parent}: {error.strerror}") from error


def _identity(stage: Stage) -> str:
    facts = {"stage": stage.name, "settings": stage.settings, "columns": [f"{field.name} {field.type}" for field in stage.schema]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

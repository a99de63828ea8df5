"""Applies the rules to a scored table with DuckDB: the kept clips become a training manifest, the removed ones keep their reasons.

A removed clip is put down to the first rule it fails, in the order of `active_rules`; all it fails are listed too. Near-duplicates are
looked for among the clips that pass every other rule, so that a group never loses its good copy to a bad one.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megasora.config.errors import UserError
from megasora.config.files import refuse_existing, written_whole
from megasora.curation.duplicates import HASH_BITS, duplicate_of
from megasora.curation.rules import SCORED_BY, FilterRules, Rule, active_rules
from megasora.curation.settings import FilterSettings
from megasora.curation.tables import METADATA_KEY, any_table_rows, clip_schema, metadata_of, write_table

DUPLICATES = "duplicate_bits"
"""Name of the rule that is not SQL."""


@dataclass(frozen=True, kw_only=True)
class RuleCount:
    """What a rule did."""

    name: str
    reason: str
    removed: int
    """Clips put down to it: no rule before it removes them."""
    fails: int
    """Clips that fail it, whatever else they fail."""
    hours: float
    """Length of what is put down to it."""


@dataclass(frozen=True, kw_only=True)
class FilterResult:
    """What a filter kept."""

    output: str
    removed: str
    record: str
    """JSON with the settings, the SQL and the counts."""
    clips: int
    kept: int
    hours: float
    kept_hours: float
    without_caption: int
    """Kept clips that have no text."""
    unknown_captions: int
    """Captions for clips that the table does not have."""
    rules: tuple[RuleCount, ...]


def removed_table(output: Path) -> Path:
    """Where the removed clips of a manifest are."""
    return output.with_name(f"{output.stem}.removed.parquet")


def record_file(output: Path) -> Path:
    """Where the record of a manifest is."""
    return output.with_name(f"{output.stem}.filter.json")


def run_filter(source: Path, settings: FilterSettings, rules: FilterRules) -> FilterResult:
    """Filter a scored table.

    Raises:
        UserError: a column or a score is missing, the SQL of `where` is wrong, nothing is kept, or a file cannot be written.
    """
    schema = clip_schema(source)
    chosen = list(active_rules(rules))
    _check(source, schema, chosen, rules)
    output = settings.output
    if output.suffix != ".parquet":
        raise UserError(f"--output {output} must end in .parquet")
    if not settings.overwrite:
        refuse_existing(output, cure="give --overwrite or another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".filter", dir=output.parent) as folder, duckdb.connect(f"{folder}/work.duckdb") as database:
        unknown = _load(database, source, settings.captions)
        query = _judge(database, chosen, has_scores="score_error" in schema.names)
        if rules.duplicate_bits is not None:
            _find_duplicates(database, rules.duplicate_bits)
        counts = _counts(database, chosen, rules)
        result = _summary(database, settings, counts, unknown)
        if result.kept == 0:
            worst = max(counts, key=lambda count: count.removed)
            raise UserError(
                f"no clip of {result.clips:,} passes; {worst.name} alone removes {worst.removed:,} ({worst.reason}): "
                "change it or turn it off"
            )
        record = {
            "result": asdict(result),
            "stage": settings.stage,
            "rules": asdict(rules),
            "sql": query,
            "input": {"path": str(source), "sha256": _sha256(source), "rows": result.clips, "written_by": metadata_of(schema)},
            "versions": {name: version(name) for name in ("duckdb", "faiss-cpu", "pyarrow")},
        }
        kept = schema.with_metadata({METADATA_KEY: json.dumps({"stage": "filter", "settings": record["rules"]}).encode()})
        more = [pa.field("removed_by", pa.string()), pa.field("failed_rules", pa.list_(pa.string())), pa.field("duplicate_of", pa.string())]
        names = ", ".join(f'"{name}"' for name in schema.names)
        _write(database, f"SELECT {names} FROM judged WHERE removed_by IS NULL ORDER BY _row", kept, output)
        _write(
            database,
            f"SELECT {names}, removed_by, failed_rules, duplicate_of FROM judged WHERE removed_by IS NOT NULL ORDER BY _row",
            pa.schema([*kept, *more], metadata=kept.metadata),
            removed_table(output),
        )
    _write_json(record_file(output), record)
    return result


def _check(source: Path, schema: pa.Schema, chosen: list[Rule], rules: FilterRules) -> None:
    wanted = [(rule.name, rule.column) for rule in chosen if rule.column in SCORED_BY]
    wanted += [(DUPLICATES, "frame_hashes")] if rules.duplicate_bits is not None else []
    for name, column in wanted:
        if column not in schema.names:
            raise UserError(
                f"rule {name} needs the column {column}, which {source} lacks: megasora data score --scores {SCORED_BY[column]} makes it, "
                f"--{name} None turns the rule off"
            )
    note = metadata_of(schema).get("settings", {}).get("aesthetic")
    if rules.min_aesthetic is not None and not (note and note["trained"]):
        raise UserError(
            "min_aesthetic: the scores come from weights that are not said to be trained; score with trained ones, or --min_aesthetic None"
        )


def _load(database: duckdb.DuckDBPyConnection, source: Path, captions: Path | None) -> int:
    """Make the table `clips`; returns how many captions found no clip."""
    database.execute(
        "CREATE TABLE clips AS SELECT * EXCLUDE (file_row_number), file_row_number AS _row FROM read_parquet($path, file_row_number=true)",
        {"path": str(source)},
    )
    if captions is None:
        return 0
    rows = any_table_rows(captions)
    key = next((name for name in ("id", "path") if rows and name in rows[0]), None)
    if key is None or "text" not in rows[0]:
        raise UserError(
            f"--captions {captions} must have the columns text and id (or path); it has {', '.join(rows[0]) if rows else 'no row'}"
        )
    given = pa.table({"key": [str(row[key]) for row in rows], "given": [str(row["text"] or "") for row in rows]})
    database.register("captions", given)
    database.execute(f"UPDATE clips SET text = captions.given FROM captions WHERE clips.{key} = captions.key")
    (unknown,) = _row(database, f"SELECT count(*) FROM captions WHERE key NOT IN (SELECT {key} FROM clips)")
    return int(unknown)


def _judge(database: duckdb.DuckDBPyConnection, chosen: list[Rule], *, has_scores: bool) -> str:
    """Make the table `judged` with failed_rules and removed_by; returns the SQL."""
    rules = [rule for rule in chosen if rule.name != "unscored" or has_scores]
    failed = ",\n    ".join(f"CASE WHEN {rule.removes} THEN '{rule.name}' END" for rule in rules)
    # a file that cannot be read fails nothing else: nothing else is known about it
    query = (
        "CREATE TABLE judged AS SELECT *, failed_rules[1] AS removed_by, NULL::VARCHAR AS duplicate_of FROM (\n"
        "  SELECT *, CASE WHEN error <> '' THEN ['broken'] ELSE list_filter([\n"
        f"    {failed}\n  ], lambda name: name IS NOT NULL) END AS failed_rules\n"
        "  FROM clips)"
    )
    try:
        database.execute(query)
    except duckdb.Error as error:
        where = next((rule.reason.removeprefix("not: ") for rule in chosen if rule.name == "where"), None)
        if where is None:
            raise
        raise UserError(f"--where {where!r}: {str(error).splitlines()[0]}") from error
    return query


def _find_duplicates(database: duckdb.DuckDBPyConnection, bits: int) -> None:
    """Mark all but the best of every group of near-duplicates among the clips that pass."""
    table = database.sql(
        "SELECT id, frame_hashes, resolution, coalesce(bits_per_pixel, 0) AS quality FROM judged WHERE removed_by IS NULL ORDER BY _row"
    ).to_arrow_table()
    lists = table["frame_hashes"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    values = pc.list_flatten(lists).cast(pa.binary(HASH_BITS // 8))
    hashes = np.frombuffer(values.buffers()[1] or b"", np.uint8).reshape(-1, HASH_BITS // 8)[values.offset : values.offset + len(values)]
    rank = np.empty(table.num_rows)  # by resolution, then by bits per pixel, then the first
    rank[np.lexsort((-np.arange(table.num_rows), table["quality"].to_numpy(), table["resolution"].to_numpy()))] = np.arange(table.num_rows)
    stays = duplicate_of(hashes, lengths, rank, bits=bits)
    gone = np.flatnonzero(stays != np.arange(table.num_rows))
    database.register("duplicates", pa.table({"id": table["id"].take(gone), "of": table["id"].take(stays[gone])}))
    database.execute(
        f"UPDATE judged SET removed_by = '{DUPLICATES}', failed_rules = ['{DUPLICATES}'], duplicate_of = duplicates.of "
        "FROM duplicates WHERE judged.id = duplicates.id"
    )


def _counts(database: duckdb.DuckDBPyConnection, chosen: list[Rule], rules: FilterRules) -> tuple[RuleCount, ...]:
    reasons = [(rule.name, rule.reason) for rule in chosen]
    if rules.duplicate_bits is not None:
        reasons.append((DUPLICATES, f"near-duplicate within {rules.duplicate_bits} bits"))
    first = {
        name: (count, hours)
        for name, count, hours in database.execute(
            "SELECT removed_by, count(*), coalesce(sum(duration_s), 0) / 3600 FROM judged WHERE removed_by IS NOT NULL GROUP BY 1"
        ).fetchall()
    }
    fails = dict(database.execute("SELECT name, count(*) FROM (SELECT unnest(failed_rules) AS name FROM judged) GROUP BY 1").fetchall())
    return tuple(
        RuleCount(
            name=name, reason=reason, removed=first.get(name, (0, 0))[0], fails=fails.get(name, 0), hours=first.get(name, (0, 0.0))[1]
        )
        for name, reason in reasons
    )


def _summary(database: duckdb.DuckDBPyConnection, settings: FilterSettings, counts: tuple[RuleCount, ...], unknown: int) -> FilterResult:
    clips, kept, hours, kept_hours, silent = _row(
        database,
        "SELECT count(*), count(*) FILTER (removed_by IS NULL), coalesce(sum(duration_s), 0) / 3600, "
        "coalesce(sum(duration_s) FILTER (removed_by IS NULL), 0) / 3600, "
        "count(*) FILTER (removed_by IS NULL AND trim(coalesce(text, '')) = '') FROM judged",
    )
    return FilterResult(
        output=str(settings.output),
        removed=str(removed_table(settings.output)),
        record=str(record_file(settings.output)),
        clips=clips,
        kept=kept,
        hours=hours,
        kept_hours=kept_hours,
        without_caption=silent,
        unknown_captions=unknown,
        rules=counts,
    )


def _row(database: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    rows: list[tuple[Any, ...]] = database.execute(query).fetchall()
    return rows[0]


def _write(database: duckdb.DuckDBPyConnection, query: str, schema: pa.Schema, path: Path) -> None:
    def typed() -> Any:
        for batch in database.sql(query).to_arrow_reader(65_536):
            yield pa.RecordBatch.from_arrays(
                [column.cast(field.type) for column, field in zip(batch.columns, schema, strict=True)], schema=schema
            )

    write_table(path, typed(), schema=schema)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The table of a run: what was measured so far, on disk after every case as JSON and as Markdown. It imports no torch."""

from __future__ import annotations

import faulthandler
import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.config.errors import UserError

Row = dict[str, Any]
GRACE_S = 40.0
"""A case that started in time may take so long beyond the budget."""
LIMIT_S = 150.0
"""A case that takes longer hangs: the process ends with its traceback, and the next one goes on after that case."""
HIDDEN = ("losses",)
"""Columns that only the JSON file holds."""


class LeftOutError(Exception):
    """A case that this machine cannot run; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row to be measured, or a few."""

    labels: Row
    measure: Callable[[], Row | list[Row]]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Cases under one heading."""

    about: str
    """One sentence for the table."""
    cases: Callable[[], Iterable[Case]]


class Table:
    """Rows by section.

    Args:
        folder: of `blocks.json` and `gpu_<date>.md`; what a process before this one wrote there today is kept when `resume`.
        resume: go on with the file that is there.
    """

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.content: dict[str, Any] = {"header": {"date": time.strftime("%Y-%m-%d")}, "sections": {}, "running": None}
        if resume and self.json_file.exists():
            self.content = json.loads(self.json_file.read_text())

    @property
    def json_file(self) -> Path:
        """All of it."""
        return self.folder / "blocks.json"

    @property
    def markdown_file(self) -> Path:
        """For people."""
        return self.folder / f"gpu_{self.content['header']['date']}.md"

    def describe(self, header: Mapping[str, Any]) -> None:
        """Add to what stands above the tables."""
        self.content["header"].update(header)
        self.write()

    def section(self, name: str) -> dict[str, Any]:
        """{about, done: cases that have their rows, rows} of a section, made when it is first asked for."""
        found: dict[str, Any] = self.content["sections"].setdefault(name, {"about": "", "done": 0, "complete": False, "rows": []})
        return found

    def start(self, name: str, labels: Row) -> None:
        """Note what is being measured, in case the process does not survive it."""
        self.content["running"] = {"section": name, "labels": labels}
        self.write()

    def add(self, name: str, rows: list[Row]) -> None:
        """The rows of the section's next case."""
        section = self.section(name)
        section["rows"] += rows
        section["done"] += 1
        self.content["running"] = None
        for row in rows:
            print("  " + "  ".join(f"{key} {short(value)}" for key, value in row.items() if key not in HIDDEN), flush=True)
        self.write()

    def write(self) -> None:
        """Both files."""
        for file, text in ((self.json_file, json.dumps(self.content, indent=1) + "\n"), (self.markdown_file, self.markdown())):
            temporary = file.with_suffix(".part")
            temporary.write_text(text)
            temporary.replace(file)

    def markdown(self) -> str:
        """The header, then a table for each section."""
        header = self.content["header"]
        lines = [f"# GPU table of {header['date']}", "", 'Measured, except the columns called "computed".', ""]
        lines += [f"- {key}: {value}" for key, value in header.items() if key != "date"]
        for name, section in self.content["sections"].items():
            lines += ["", f"## {name}", ""] + ([section["about"], ""] if section["about"] else []) + markdown_table(section["rows"])
        return "\n".join(lines) + "\n"


def markdown_table(rows: list[Row]) -> list[str]:
    """Lines of a table with every key of the rows; a row that was left out or failed says so in its last column."""
    if not rows:
        return ["no rows"]
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("left_out", "failed", *HIDDEN)]
    noted = any(_note(row) for row in rows)
    lines = ["| " + " | ".join(columns + ["note"] * noted) + " |", "|" + "---|" * (len(columns) + noted)]
    for row in rows:
        cells = [short(row[column]) if row.get(column) is not None else "" for column in columns] + [_note(row)] * noted
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return lines


def _note(row: Row) -> str:
    return next((f"{word}: {row[key]}" for key, word in (("left_out", "left out"), ("failed", "failed")) if key in row), "")


def short(value: Any) -> str:
    """Four digits of a float, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_sections(
    table: Table, sections: Mapping[str, Section], *, deadline: float, before_case: Callable[[], None] = lambda: None, watch: bool = False
) -> None:
    """Measure the sections in their order; whatever fails or comes too late becomes a row that says so.

    Args:
        table: rows are added to it; cases that it has are not measured again.
        sections: by name.
        deadline: no case starts after it, in seconds of time.time().
        before_case: what to do before each case; where it raises, so does this function.
        watch: end the process when a case takes longer than LIMIT_S or than the time that is left and half of GRACE_S.
    """
    for name, section in sections.items():
        state = table.section(name)
        if state["complete"]:
            continue
        print(f"== {name}", flush=True)
        state["about"] = section.about
        if time.time() >= deadline and not state["done"]:
            table.add(name, [{"left_out": "no time"}])
        else:
            for case in _cases(section)[state["done"] :]:
                before_case()
                _run_case(table, name, case, deadline=deadline, watch=watch)
        state["complete"] = True
        table.write()


def _cases(section: Section) -> list[Case]:
    try:
        return list(section.cases())
    except Exception as error:  # noqa: BLE001 - a section that cannot name its cases must not lose the others
        traceback.print_exc()
        row = _failure(error)
        return [Case(labels={}, measure=lambda: row)]


def _run_case(table: Table, name: str, case: Case, *, deadline: float, watch: bool) -> None:
    left = deadline - time.time()
    if left <= 0:
        table.add(name, [case.labels | {"left_out": "no time"}])
        return
    table.start(name, case.labels)
    if watch:
        faulthandler.dump_traceback_later(min(LIMIT_S, left + GRACE_S / 2), exit=True)
    try:
        measured = case.measure()
        rows = measured if isinstance(measured, list) else [measured]
    except Exception as error:  # noqa: BLE001 - one case's failure must not lose the others on a rented machine
        if not isinstance(error, (LeftOutError, UserError)):
            traceback.print_exc()
        rows = [_failure(error)]
    finally:
        if watch:
            faulthandler.cancel_dump_traceback_later()
    table.add(name, [case.labels | row for row in rows])


def _failure(error: Exception) -> Row:
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return {"left_out": text} if isinstance(error, (LeftOutError, UserError)) else {"failed": f"{type(error).__name__}: {text}"}

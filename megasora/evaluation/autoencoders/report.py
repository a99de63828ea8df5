"""What stays of an evaluation: results.json, results.csv and report.html in its folder. Files that are there are replaced."""

from __future__ import annotations

import json
from pathlib import Path

from megasora.config.files import written_whole
from megasora.evaluation.autoencoders.page import page_of
from megasora.evaluation.autoencoders.summary import Results
from megasora.evaluation.autoencoders.table import write_csv


def write_report(results: Results) -> dict[str, Path]:
    """Write everything; returns what -> where."""
    folder = results.evaluation.settings.out
    files = {"json": folder / "results.json", "csv": folder / "results.csv", "page": folder / "report.html"}
    texts = {"json": json.dumps(results.as_dict(), indent=1, allow_nan=False) + "\n", "page": page_of(results)}
    for what, text in texts.items():
        with written_whole(files[what]) as temporary:
            temporary.write_text(text, encoding="utf-8")
    write_csv(results, files["csv"])
    return files

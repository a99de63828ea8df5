"""Tables that a user gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasora.config.errors import UserError
from megasora.curation.tables import any_table_rows


def test_a_list_with_a_row_of_too_many_or_too_few_cells_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("path,text\na.mp4,one\nb.mp4,two, three\nc.mp4,four\nd.mp4\n")
    with pytest.raises(
        UserError, match=r"row 1 has 3 cells instead of 2 \(and 1 more such rows\); put cells that contain commas in quotes"
    ):
        any_table_rows(path)
    path.write_text("path,text\na.mp4,one\nd.mp4\n")
    with pytest.raises(UserError, match=r"row 1 has 1 cells instead of 2; put"):
        any_table_rows(path)
    path.write_text('path,text\na.mp4,"one, two"\n')
    assert any_table_rows(path) == [{"path": "a.mp4", "text": "one, two"}]

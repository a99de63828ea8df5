"""What is written is there whole or not at all, and a name that is taken is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megasora.config.errors import UserError
from megasora.config.files import hidden_beside, refuse_existing, written_whole


def test_a_file_keeps_its_old_content_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_text("old")
    with written_whole(path, sync=True) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".clip.") and temporary.suffix == ".mp4"
        assert os.uname().nodename in temporary.name and str(os.getpid()) in temporary.name
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_a_failure_leaves_nothing_of_a_file_or_a_folder(tmp_path: Path) -> None:
    def write_half(path: Path, *, folder: bool) -> None:
        with written_whole(path) as temporary:
            if folder:
                temporary.mkdir()
            (temporary / "part" if folder else temporary).write_text("half")
            raise KeyboardInterrupt

    for folder in (False, True):
        with pytest.raises(KeyboardInterrupt):
            write_half(tmp_path / "made", folder=folder)
        assert os.listdir(tmp_path) == []


def test_a_folder_appears_whole_and_a_killed_process_of_the_same_number_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "encoders"
    hidden_beside(path).mkdir()
    (hidden_beside(path) / "leftover").write_text("")
    with written_whole(path) as temporary:
        temporary.mkdir()
        (temporary / "part").write_text("whole")
        assert not path.exists()
    assert os.listdir(tmp_path) == ["encoders"]
    assert os.listdir(path) == ["part"]


def test_a_folder_that_holds_something_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.mkdir()
    (path / "mine").write_text("")
    with pytest.raises(OSError, match="not empty"), written_whole(path) as temporary:
        temporary.mkdir()
    assert os.listdir(tmp_path) == ["weights"]
    assert os.listdir(path) == ["mine"]


def test_a_taken_name_is_refused_with_the_cure(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "free", cure="never told")
    with pytest.raises(UserError, match=f"^{tmp_path} exists; give another name$"):
        refuse_existing(tmp_path, cure="give another name")

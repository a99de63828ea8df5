"""How a command leaves: without a word when nobody reads on, and without process groups when all went well."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from megasora import cli
from megasora.cli.endings import end_world


def start_world() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_a_reader_that_has_seen_enough_ends_the_command_quietly() -> None:
    command = subprocess.Popen(
        [sys.executable, "-m", "megasora", "recipes", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    command.stdout.close()
    assert command.stderr is not None
    errors = command.stderr.read()
    command.stderr.close()
    assert command.wait(timeout=60) == 128 + signal.SIGPIPE
    assert errors == ""


def test_process_groups_end_with_the_command() -> None:
    with end_world():
        start_world()
    assert not dist.is_initialized()


def test_a_failed_command_does_not_wait_for_other_ranks() -> None:
    def fails() -> None:
        with end_world():
            start_world()
            raise ValueError("of this rank")

    with pytest.raises(ValueError, match="of this rank"):
        fails()
    assert dist.is_initialized()
    dist.destroy_process_group()


def test_a_mistake_is_noted_for_the_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASORA_MISTAKE_FILE", str(tmp_path / "mistake"))
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as end:
        cli.main(["show", "tinyy"])
    assert end.value.code == 2
    assert (tmp_path / "mistake").read_text() == "rank 3: no recipe called 'tinyy': did you mean tiny?\n"

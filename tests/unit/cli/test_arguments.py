"""The command line says no to what it would not use."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megasora import cli


@pytest.mark.parametrize("command", ["recipes", "doctor"])
def test_an_argument_nobody_reads_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--jsn"])
    assert end.value.code == 2
    assert "got --jsn" in capsys.readouterr().err


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as end:
        cli.main(["show", "tinyy"])
    assert end.value.code == 2
    assert capsys.readouterr().err == ""


def test_a_size_of_zero_is_a_problem_and_no_stack_trace(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["validate", "tiny", "--parallel.tensor_model_parallel_size", "0"])
    assert end.value.code == 2
    assert "parallel.tensor_model_parallel_size: is 0" in capsys.readouterr().err


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, megasora.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

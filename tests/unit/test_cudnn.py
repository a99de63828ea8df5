"""One cuDNN in a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasora import cudnn
from megasora.config.errors import UserError
from megasora.parallel.attention_kernels import _refuse_two_cudnns

BOTH = """\
7f01-7f02 r-xp 00000000 fe:00 11  /opt/venv/lib/python3.12/site-packages/nvidia/cudnn/lib/libcudnn.so.9
7f02-7f03 r--p 00000000 fe:00 11  /opt/venv/lib/python3.12/site-packages/nvidia/cudnn/lib/libcudnn.so.9
7f03-7f04 r-xp 00000000 fe:00 12  /opt/venv/lib/python3.12/site-packages/nvidia/cudnn/lib/libcudnn_graph.so.9
7f04-7f05 r-xp 00000000 fe:00 13  /usr/lib/x86_64-linux-gnu/libcudnn.so.9.14.0
7f05-7f06 rw-p 00000000 00:00 0
"""
"""As an H100 machine showed it, shortened."""


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed nvidia-cudnn."""
    folder = tmp_path / "nvidia" / "cudnn"
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / "libcudnn.so.9").touch()
    monkeypatch.syspath_prepend(tmp_path)
    import sys

    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    return folder


def test_transformer_engine_is_pointed_at_the_wheels_cudnn(wheel: Path) -> None:
    environment: dict[str, str] = {}
    cudnn.prefer_torchs(environment)
    assert environment == {"CUDNN_HOME": str(wheel)}


@pytest.mark.parametrize("name", cudnn.NAMED_BY)
def test_the_users_choice_stays(wheel: Path, name: str) -> None:
    environment = {name: "/opt/cudnn"}
    cudnn.prefer_torchs(environment)
    assert environment == {name: "/opt/cudnn"}


def test_nothing_is_set_where_the_wheel_holds_no_library(wheel: Path) -> None:
    (wheel / "lib" / "libcudnn.so.9").unlink()
    environment: dict[str, str] = {}
    cudnn.prefer_torchs(environment)
    assert environment == {}


def test_both_libraries_are_named_where_two_are_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = cudnn.loaded(BOTH.splitlines())
    assert [Path(file).name for file in found] == ["libcudnn.so.9", "libcudnn.so.9.14.0"]
    (tmp_path / "maps").write_text(BOTH)
    monkeypatch.setattr(cudnn, "MAPS", tmp_path / "maps")
    with pytest.raises(UserError, match=r"loaded 2: /opt/venv/.* and /usr/lib/.*; set CUDNN_HOME"):
        _refuse_two_cudnns(RuntimeError("cuDNN Error: cudnnFinalize failed, CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED"))


def test_other_failures_and_one_library_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "maps").write_text("\n".join(BOTH.splitlines()[:3]))
    monkeypatch.setattr(cudnn, "MAPS", tmp_path / "maps")
    _refuse_two_cudnns(RuntimeError("cuDNN Error: no kernel"))
    (tmp_path / "maps").write_text(BOTH)
    _refuse_two_cudnns(RuntimeError("out of memory"))

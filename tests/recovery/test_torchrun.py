"""Two ranks under torchrun, which knows nothing of why they end."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasora.recovery.folder import RecoveryFolder
from tests.recovery.test_supervisor import STATE, STEPS, cause
from tests.recovery.worlds import by_torchrun, endings, free_port, total

pytestmark = pytest.mark.slow


def loop(run_dir: Path, *, faults: str) -> list[str]:
    return ["tests.recovery.loop", str(run_dir), str(STEPS), "0.1", faults]


def test_ranks_of_two_nodes_meet_again(tmp_path: Path) -> None:
    """The agents' store still holds what the first ranks wrote, and each agent counts restarts by itself."""
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "job", "--local-addr", "localhost"]
    with by_torchrun(loop(tmp_path, faults="raise:1:4,raise:0:6"), options=["--nnodes", "2", *meet], agents=2) as agents:
        ends = endings(agents, within_s=300)
    assert [code for code, _ in ends] == [0, 0], ends
    assert total(tmp_path) == STATE
    assert [cause(tmp_path, number).rank for number in (1, 2)] == [1, 0]


def test_a_mistake_is_not_repeated(tmp_path: Path) -> None:
    options = ["--nproc-per-node", "2", "--master-port", str(free_port())]
    with by_torchrun(loop(tmp_path, faults="mistake:all:4"), options=options) as agents:
        ((code, _),) = endings(agents, within_s=300)
    assert code == 1
    assert cause(tmp_path, 1).kind == "mistake"
    assert not RecoveryFolder.of_run(tmp_path).heartbeat(0).read_text().count('"incarnation": 2')

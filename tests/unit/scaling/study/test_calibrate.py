"""Calibration: arithmetic by hand, and a small one on two real ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megasora import cli, recipes
from megasora.perf.hardware import Hardware, load_hardware, save_hardware
from megasora.scaling.study.calibrate import collectives, profile
from megasora.scaling.study.calibrate.collectives import Transfer, fit, sent_bytes
from megasora.scaling.study.calibrate.profile import Calibration, Scale, calibrate, hardware_of
from megasora.scaling.study.calibrate.timing import timed
from tests.pool import RankPool

SMALL = Scale(rows=(16, 32), tokens=(16,), memory_bytes=(2**16,), parameters=1000, repeats=2)
CPU = torch.device("cpu")


def moved(operation: str, payload: int, seconds: float) -> Transfer:
    return Transfer(operation=operation, payload_bytes=payload, sent_bytes=float(payload), seconds=seconds, steps=1)


def test_a_ring_sends_its_share() -> None:
    found = [sent_bytes(operation, 1000, ranks=4) for operation in collectives.OPERATIONS]
    assert found == [750, 750, 1500, 750, 1000]


def test_a_link_is_the_median_of_its_operations() -> None:
    found = [
        moved("a", 8, 1.0),
        moved("a", 1000, 11.0),
        moved("b", 8, 2.0),
        moved("b", 1000, 7.0),
        moved("c", 8, 9.0),
        moved("c", 1000, 13.0),
    ]
    assert fit(found) == (200.0, 2.0)  # rates 100, 200, 250; latencies 1, 2, 9


def test_a_median_lies_between_its_extremes() -> None:
    found = timed(lambda: sum(range(1000)), device=CPU, repeats=3)
    assert 0 < found.min_s <= found.median_s <= found.max_s


def measure(rank: int) -> Calibration:
    profile.CPU_SCALE = SMALL
    profile.PAYLOADS["cpu"] = (2**10, 2**12)
    collectives.TOGETHER_S = 0.05
    return calibrate(recipes.get("tiny"), device=CPU)


def test_two_ranks_become_a_profile_that_can_be_read_back(tmp_path: Path, pool: RankPool) -> None:
    found, other = pool.run(2, measure)
    assert found.kernels == other.kernels  # rank 0 measured, all know
    assert [count for count, _ in found.losses] == [1.0, 2.0]
    assert found.losses[0][1] == 1.0
    hardware = hardware_of(found, device=CPU, name="here", about="a test")
    assert [size for size, _ in hardware.rates.matmul] == [16, 32]
    assert hardware.links[0].source.endswith("2 ranks of one computer")
    save_hardware(hardware, tmp_path / "here.yaml")
    again: Hardware = load_hardware(str(tmp_path / "here.yaml"))
    assert again == hardware


def test_one_rank_says_that_its_link_is_not_measured(pool: RankPool) -> None:
    (found,) = pool.run(1, measure)
    hardware = hardware_of(replace(found, transfers=()), device=CPU, name="here", about="a test")
    assert hardware.links[0].source == "not measured: start it with torchrun on several ranks"


def test_a_profile_needs_a_known_ending(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["study", "calibrate", "tiny", "--output", "machine.txt"])
    assert "must end in .yaml or .json" in capsys.readouterr().err

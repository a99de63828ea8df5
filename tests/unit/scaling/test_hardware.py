"""Profiles: their numbers, files and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasora.config.errors import UserError
from megasora.perf.hardware import load_hardware, rate_at, save_hardware
from megasora.perf.profiles import PROFILES


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_profile_comes_back_from_its_file(name: str, ending: str, tmp_path: Path) -> None:
    hardware = load_hardware(name)
    save_hardware(hardware, tmp_path / f"machine.{ending}")
    assert load_hardware(str(tmp_path / f"machine.{ending}")) == hardware
    assert hardware.rates.source
    assert all(link.source for link in hardware.links)


@pytest.mark.parametrize("name", PROFILES)
def test_nothing_runs_above_its_data_sheet(name: str) -> None:
    hardware = load_hardware(name)
    rates, bf16 = hardware.rates, hardware.peak_of("bf16")
    assert bf16 is not None
    for points in (rates.matmul, rates.attention_forward, rates.attention_backward):
        assert max(rate for _, rate in points) < bf16
    assert all(rate < (hardware.peak_of("fp8") or 0) for _, rate in rates.matmul_fp8)


def test_the_peak_is_the_one_that_training_reports_mfu_by() -> None:
    from megasora.perf.peaks import PEAK_BF16_TFLOPS

    for name, peak in PEAK_BF16_TFLOPS.items():
        assert load_hardware(name.lower()).peak_of("bf16") == peak * 1e12


def test_changes_after_a_colon() -> None:
    hardware = load_hardware("h200:ib800,price=1.25")
    assert (hardware.links[-1].bytes_per_s, hardware.dollars_per_gpu_hour) == (88e9, 1.25)
    assert hardware.links[0] == load_hardware("h200").links[0]


@pytest.mark.parametrize(
    ("name", "said"), [("v100", "there are h100"), ("h200:ib100", "ib200, ib400, ib800"), ("h200:price=cheap", "price=DOLLARS")]
)
def test_what_is_no_profile(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_hardware(name)


def test_what_is_no_profile_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        load_hardware(str(tmp_path / "none.yaml"))
    file = tmp_path / "wrong.yaml"
    save_hardware(load_hardware("h100"), file)
    file.write_text(file.read_text().replace("latency_s", "latency"))
    with pytest.raises(UserError, match="did you mean latency_s"):
        load_hardware(str(file))


def test_rates_between_points_follow_the_logarithm() -> None:
    points = ((10.0, 1.0), (1000.0, 3.0))
    assert [rate_at(points, size) for size in (1, 10, 100, 1000, 1e6)] == pytest.approx([1, 1, 2, 3, 3])

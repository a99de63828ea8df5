"""Times of collectives, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megasora.perf.hardware import Link
from megasora.perf.network import collective_s, placement_of
from megasora.perf.profiles import H100

INNER = Link(bytes_per_s=400.0, latency_s=0.0, ranks=8, source="")
OUTER = Link(bytes_per_s=50.0, latency_s=0.0, ranks=0, source="")
MACHINE = replace(H100, links=(INNER, OUTER))


def seconds(kind: str, size: float, *, ranks: int, stride: int = 1) -> float:
    placement = placement_of(size=ranks, stride=stride, domain=8)
    return collective_s(kind, size, placement=placement, hardware=MACHINE)  # type: ignore[arg-type]


def test_a_group_of_one_costs_nothing() -> None:
    assert seconds("all_reduce", 1e9, ranks=1) == 0.0


def test_inside_a_node() -> None:
    assert seconds("all_gather", 800, ranks=8) == pytest.approx(7 / 8 * 800 / 400)
    assert seconds("all_reduce", 800, ranks=8) == pytest.approx(2 * 7 / 8 * 800 / 400)


def test_across_nodes_every_card_of_the_group_serves() -> None:
    """16 neighbours: eight cards a node make 400, as fast as inside; strided by 8, one card each: 50."""
    assert seconds("reduce_scatter", 1600, ranks=16) == pytest.approx(15 / 16 * 1600 / 400)
    assert seconds("reduce_scatter", 1600, ranks=16, stride=8) == pytest.approx(15 / 16 * 1600 / 50)
    assert seconds("reduce_scatter", 1600, ranks=8, stride=4) == pytest.approx(7 / 8 * 1600 / 100)


def test_all_to_all_across_nodes_leaves_through_its_own_card() -> None:
    assert seconds("all_to_all", 1600, ranks=16) == pytest.approx(max(7 / 16 * 1600 / 400, 8 / 16 * 1600 / 50))


def test_latency_grows_with_ranks_inside_and_with_the_log_of_domains_across() -> None:
    machine = replace(H100, links=(replace(INNER, latency_s=1.0), replace(OUTER, latency_s=10.0)))
    inside = collective_s("all_gather", 0, placement=placement_of(size=8, stride=1, domain=8), hardware=machine)
    across = collective_s("all_gather", 0, placement=placement_of(size=64, stride=1, domain=8), hardware=machine)
    assert (inside, across) == (7.0, 7.0 + 3 * 10.0)


def test_a_neighbouring_stage_is_in_the_node_only_where_the_stride_says_so() -> None:
    assert placement_of(size=2, stride=4, domain=8).per_domain == 2
    assert placement_of(size=2, stride=8, domain=8).per_domain == 1
    assert placement_of(size=16, stride=1, domain=0).domains == 1

"""Ranks with an emulated H200 each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gpu_emulated.emulation import emulate, emulate_with_apex, emulate_with_triton
from tests.pool import RankPool


@pytest.fixture(scope="session")
def gpus() -> Iterator[RankPool]:
    """Eight ranks whose `--device cuda` works; a pool of their own, for Transformer Engine must be there before Megatron is imported."""
    ranks = RankPool(prepare=emulate)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def apex_gpus() -> Iterator[RankPool]:
    """Two such ranks where apex is installed and Transformer Engine is not."""
    ranks = RankPool(2, prepare=emulate_with_apex)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def triton_gpus() -> Iterator[RankPool]:
    """Four such ranks where Triton is installed, interpreted."""
    ranks = RankPool(4, prepare=emulate_with_triton)
    yield ranks
    ranks.close()

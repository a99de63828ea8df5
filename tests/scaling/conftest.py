"""Dry runs need a process without groups of its own: one, for all tests here."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

import pytest


def _quietly() -> None:
    warnings.filterwarnings("ignore")


@pytest.fixture(scope="session")
def apart() -> Iterator[Executor]:
    """Runs functions in a process without torch.distributed, one after another."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_quietly) as pool:
        yield pool

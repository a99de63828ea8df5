"""Fixtures shared by all tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.pool import RankPool

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Up to eight gloo ranks, started by the first test that needs them."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture
def chromium() -> Iterator[Any]:
    """What starts the system's headless Chromium: takes playwright's methods `launch` and `launch_persistent_context`."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")

    def start(method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(playwright.chromium, method)(*args, executable_path=CHROMIUM, args=["--no-sandbox"], **kwargs)

    with sync_api.sync_playwright() as playwright:
        yield start


@pytest.fixture
def browser(chromium: Any) -> Iterator[Any]:
    """Headless Chromium that forgets everything when it is closed."""
    running = chromium("launch")
    yield running
    running.close()

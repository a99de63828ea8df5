"""Fixtures shared by all tests, and how the suite shares out two cores."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is there; also of the processes that tests start: threads spin more than such shapes give them to do
)

from tests.pool import RankPool  # noqa: E402

LONGEST = ("slurm", "recovery", "faults", "gpu_emulated", "scaling", "parallel", "examples")
"""Folders that are begun first: a worker of pytest-xdist that came late to one of them would end it alone."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest folders first; files stay whole."""

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files to workers as they come, but for a folder whose tests share one cluster."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "tests/slurm" if file.startswith("tests/slurm/") else file

    return ByFile(config, log)


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

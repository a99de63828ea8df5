"""A stale writer against a run that takes over, interleaved at every file system call: what the new run lists is what stays.

Each side is a thread that stops before each of its calls. The stale one publishes or prunes; the new one takes the lease, then lists.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from megasora.checkpoint import commit, manifests, store
from megasora.checkpoint.lease import Lease, Token

CALLS = ("listdir", "link", "mkdir", "open", "rename", "replace", "rmdir", "scandir", "stat", "unlink")
Act = Literal["publish", "replace", "prune"]
ALL = 1 << 30


class Actor(threading.Thread):
    """Does its work call by call, as many as it is allowed."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.result = work, None
        self.error: Exception | None = None
        self.calls = 0
        self._changed = threading.Condition()
        self._allowed, self._stands, self._ended = 0, False, False

    def run(self) -> None:
        """Work until the end."""
        try:
            self.result = self.work()
        except (OSError, ValueError) as error:
            self.error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def before_call(self) -> None:
        """Stand until a call is allowed."""
        with self._changed:
            while self._allowed == 0:
                self._stands = True
                self._changed.notify_all()
                self._changed.wait()
            self._stands = False
            self._allowed -= 1
            self.calls += 1

    def advance(self, calls: int) -> None:
        """Let it do so many calls; returns when it has."""
        with self._changed:
            self._allowed, self._stands = calls, calls == 0 and self._stands
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or (self._stands and self._allowed == 0), timeout=60)


@pytest.fixture(autouse=True)
def gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of an actor's thread waits for its turn."""

    def gated(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            thread = threading.current_thread()
            if isinstance(thread, Actor):
                thread.before_call()
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for name in CALLS:
        monkeypatch.setattr(os, name, gated(getattr(os, name)))


def checkpoint(folder: Path, content: str) -> None:
    """A complete checkpoint of one file."""
    folder.mkdir()
    (folder / "data").write_text(content)
    files = {"data": manifests.facts_of(content.encode())}
    commit.write_synced(folder / manifests.NAME, commit.json.dumps({"format": manifests.TRAINING, "files": files}).encode())


def listed(root: Path) -> dict[int, str]:
    """Complete checkpoints and what they hold."""
    return {entry.step: (entry.path / "data").read_text() for entry in store.complete_checkpoints(root)}


class Scene:
    """A run that has saved and is in the middle of something, and another that takes its place.

    Args:
        root: an empty folder.
        act: what the first is doing.
    """

    def __init__(self, root: Path, act: Act) -> None:
        self.root = root
        self.old = Lease.take(root, token=replace(Token.own({}), started="1"), beat_s=60)
        for step in (1, 2, 3):
            checkpoint(store.step_folder(root, step), f"old {step}")
        commit.write_synced(root / store.TRACKER, b"step_00000003\n")
        self.before = listed(root)
        self.step = 3 if act == "replace" else 4
        self.stale, self.new = Actor(self._prune if act == "prune" else self._publish), Actor(self._take)
        self.taken: Lease | None = None
        self.stale.start()
        self.new.start()

    def _publish(self) -> None:
        folder = self.old.work / f"step_{self.step:08d}"
        checkpoint(folder, f"new {self.step}")
        commit.publish(self.old, folder, step=self.step)

    def _prune(self) -> None:
        commit.prune(self.old, keep=1, keep_every_steps=0)

    def _take(self) -> dict[int, str]:
        self.taken = Lease.take(self.root, beat_s=60)
        return listed(self.root)

    def play(self, turns: Iterator[tuple[Actor, int]]) -> None:
        """Let both act in turn, then to their ends; the stale one first."""
        for actor, calls in turns:
            actor.advance(calls)
        self.stale.advance(ALL)
        self.new.advance(ALL)
        self.stale.join(60)
        self.new.join(60)

    def check(self, act: Act) -> str:
        """The new run sees whole checkpoints, and the stale one changed nothing after it had looked; which way it went."""
        assert self.new.error is None, self.new.error
        assert self.taken is not None
        seen = self.new.result
        assert listed(self.root) == seen, "changed after it was listed"
        assert (self.root / store.TRACKER).read_text().strip() in {f"step_{step:08d}" for step in seen}
        assert not self.old.work.exists()
        gone = set(self.before) - set(seen)
        assert gone <= ({1, 2} if act == "prune" else set())
        published = seen.get(self.step) == f"new {self.step}"
        if act != "prune":
            assert seen == {**self.before, **({self.step: f"new {self.step}"} if published else {})}
            assert published or self.stale.error is not None, "it says it has saved what nobody sees"
        self.taken.release()
        return "published" if published else type(self.stale.error).__name__ if self.stale.error else f"pruned {len(gone)}"


def played(root: Path, act: Act, turns: Callable[[Scene], list[tuple[Actor, int]]]) -> tuple[str, int, int]:
    """How a scene went and how many calls each side made."""
    root.mkdir()
    scene = Scene(root, act)
    scene.play(iter(turns(scene)))
    outcome = scene.check(act)
    scene.old._stop.set()
    with suppress(FileNotFoundError):
        shutil.rmtree(root)
    return outcome, scene.stale.calls, scene.new.calls


@pytest.mark.parametrize("act", ["publish", "replace", "prune"])
def test_nothing_changes_after_the_new_run_has_looked(tmp_path: Path, act: Act) -> None:
    """The stale one stops after each of its calls, the new one after each of its; then the stale one goes on to its end."""
    outcomes: dict[str, int] = {}
    _, stale_calls, _ = played(tmp_path / "alone", act, lambda scene: [(scene.stale, ALL)])
    _, _, new_calls = played(tmp_path / "later", act, lambda scene: [(scene.new, ALL)])
    for number, (first, second) in enumerate(itertools.product(range(stale_calls + 1), range(new_calls + 1))):
        outcome, *_ = played(tmp_path / str(number), act, lambda s, a=first, b=second: [(s.stale, a), (s.new, b)])  # type: ignore[misc]
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert len(outcomes) > 1, outcomes
    assert outcomes.get("LeaseLostError", 0) > 0


@pytest.mark.parametrize("act", ["publish", "replace", "prune"])
def test_nothing_changes_whatever_the_turns(tmp_path: Path, act: Act) -> None:
    """Seeded turns of one to five calls."""
    draws = random.Random(act)
    for number in range(60):
        lengths = [draws.randint(1, 5) for _ in range(24)]
        played(tmp_path / str(number), act, lambda s, n=lengths: list(zip(itertools.cycle((s.stale, s.new)), n)))  # type: ignore[misc]

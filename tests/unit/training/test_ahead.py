"""One item is made ahead, by one thread, in order; errors come where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from megasora.training.ahead import Ahead

CPU = torch.device("cpu")


def ahead_of(items: Iterator[int]) -> Ahead[int]:
    return Ahead(items, tensors=lambda item: (), device=CPU)


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it holds within some seconds."""
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def test_the_next_item_is_made_while_one_is_used_and_no_other() -> None:
    made: list[tuple[int, str]] = []

    def items() -> Iterator[int]:
        for number in range(4):
            made.append((number, threading.current_thread().name))
            yield number

    ahead = ahead_of(items())
    assert made == []  # nothing before the first is asked for
    taken = []
    for number in ahead:
        taken.append(number)
        assert eventually(lambda number=number: len(made) == min(number + 2, 4))  # type: ignore[misc]
    ahead.close()
    assert taken == [0, 1, 2, 3]
    assert {name for _, name in made} == {"ahead_0"}


def test_an_error_of_the_thread_is_raised_where_its_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise ValueError("clip 7 cannot be encoded")

    ahead = ahead_of(items())
    steps = iter(ahead)
    assert next(steps) == 0
    with pytest.raises(ValueError, match="clip 7 cannot be encoded"):
        next(steps)
    ahead.close()


def test_close_ends_the_thread_after_the_item_it_is_at() -> None:
    begun, held = threading.Event(), threading.Event()
    finished: list[int] = []

    def items() -> Iterator[int]:
        yield 0
        begun.set()
        held.wait(20)
        finished.append(1)
        yield 1

    ahead = ahead_of(items())
    assert next(iter(ahead)) == 0
    assert begun.wait(20)  # one not begun is never made
    threading.Timer(0.1, held.set).start()
    ahead.close()
    assert finished == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_settled_means_that_the_thread_is_idle() -> None:
    busy = threading.Event()

    def items() -> Iterator[int]:
        for number in range(3):
            busy.set()
            time.sleep(0.05)
            busy.clear()
            yield number

    ahead = ahead_of(items())
    for _ in ahead:
        ahead.settle()
        assert not busy.is_set()
    ahead.close()


class Recorded:
    """A stream, or a tensor, that notes what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Recorded) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.log.append(f"event on {self.name}")
        return f"event on {self.name}"

    def record_stream(self, stream: Recorded) -> None:
        self.log.append(f"{self.name} kept for {stream.name}")


def test_on_cuda_the_device_waits_and_the_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread's stream starts after the caller's work; the caller's stream waits for the event that follows the item; then the tensors'
    memory, which belongs to the thread's stream, is kept for the caller's (torch.Tensor.record_stream)."""
    log: list[str] = []
    caller, worker = Recorded("caller", log), Recorded("worker", log)

    @contextmanager
    def on(stream: Recorded) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield

    replaced = {"Stream": lambda _: worker, "current_stream": lambda _: caller, "stream": on, "set_device": lambda _: None}
    for name, replacement in replaced.items():
        monkeypatch.setattr(torch.cuda, name, replacement)

    def items() -> Iterator[Recorded]:
        log.append("made")
        yield Recorded("tensor", log)

    ahead = Ahead(items(), tensors=lambda item: [item], device=torch.device("cuda", 0))  # type: ignore[list-item]
    steps = iter(ahead)
    next(steps)
    ahead.settle()
    ahead.close()
    assert log[:4] == ["worker waits for caller", "on worker", "made", "event on worker"]
    taken = ["caller waits for event on worker", "tensor kept for caller"]
    assert [line for line in log[4:] if line in taken] == taken
    assert log[-1] == "caller waits for worker"  # settled

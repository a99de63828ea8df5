"""One item is made ahead, by one thread, in order; errors come where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

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
    held = threading.Event()
    finished: list[int] = []

    def items() -> Iterator[int]:
        yield 0
        held.wait(20)
        finished.append(1)
        yield 1

    ahead = ahead_of(items())
    assert next(iter(ahead)) == 0
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

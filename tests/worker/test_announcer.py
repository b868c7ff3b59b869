"""Layers stored while the asyncio thread sleeps travel together, in order, and none is lost."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any

import pytest
from diptych.prefill_worker.announcer import Announcer, Stretch

A, B = Stretch("a", 0, 32, ((1, 2),)), Stretch("b", 16, 20, ((3,),))


def test_layers_stored_before_the_wake_up_are_one_call() -> None:
    calls: list[Any] = []
    queue: list[Callable[[], None]] = []
    announcer = Announcer((A, B), lambda *arguments: calls.append(arguments), queue.append, layers=4)
    for layer in range(3):
        announcer.stored(layer)
    assert len(queue) == 1
    queue.pop()()
    assert calls == [("a", (0, 1, 2), 0, 32, ((1, 2),), 0), ("b", (0, 1, 2), 16, 20, ((3,),), 0)]
    announcer.stored(3)
    queue.pop()()
    assert [call[:2] for call in calls[2:]] == [("a", (3,)), ("b", (3,))]


def test_a_step_is_announced_after_what_was_told_before_it_began() -> None:
    """A wake-up still to come for the step before must not take this step's layers along: its Offer lies in between."""
    order: list[str] = []
    queue: list[Callable[[], None]] = []
    before = Announcer((A,), lambda *arguments: order.append("a"), queue.append, layers=2)
    before.stored(0)
    queue.append(lambda: order.append("offer b"))
    Announcer((B,), lambda *arguments: order.append("b"), queue.append, layers=2).stored(0)
    before.stored(1)
    for call in queue:
        call()
    assert order == ["a", "offer b", "b"]


def test_each_rank_is_told_of_in_the_order_of_its_steps_when_another_is_ahead() -> None:
    told: list[tuple[str, int]] = []
    queue: list[Callable[[], None]] = []

    def of_each_rank(name: str) -> list[Announcer]:
        return [
            Announcer((A,), lambda *arguments: told.append((name, arguments[-1])), queue.append, layers=1, rank=rank) for rank in range(2)
        ]

    before, behind = of_each_rank("first step"), of_each_rank("second step")
    before[0].stored(0)
    queue.pop()()
    behind[0].stored(0)  # rank 0 is a step ahead, and the asyncio thread has not looked yet
    before[1].stored(0)
    behind[1].stored(0)
    for call in queue:
        call()
    assert [step for step, rank in told if rank == 1] == ["first step", "second step"]


def test_so_many_layers_are_told_together_and_the_last_ones_at_once() -> None:
    told: list[tuple[int, ...]] = []
    queue: list[Callable[[], None]] = []
    announcer = Announcer((A,), lambda transfer_id, layers, *rest: told.append(layers), queue.append, layers=8, together=3)
    for layer in range(8):
        announcer.stored(layer)
        while queue:
            queue.pop()()
    assert told == [(0, 1, 2), (3, 4, 5), (6, 7)]


@pytest.mark.parametrize("together", [1, 7])
def test_no_layer_is_lost_between_two_threads(together: int) -> None:
    layers: list[int] = []
    queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
    announcer = Announcer((A,), lambda transfer_id, some, *rest: layers.extend(some), queue.put, layers=20_000, together=together)

    def engine() -> None:
        for layer in range(20_000):
            announcer.stored(layer)
        queue.put(None)

    thread = Thread(target=engine)
    thread.start()
    while (call := queue.get(timeout=10)) is not None:
        call()
    thread.join()
    assert layers == list(range(20_000))

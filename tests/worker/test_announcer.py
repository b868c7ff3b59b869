"""Layers stored while the asyncio thread sleeps travel together, in order, and none is lost."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

from diptych.prefill_worker.announcer import Announcer, Stretch


def test_layers_stored_before_the_wake_up_are_one_call() -> None:
    calls: list[Any] = []
    queue: list[Callable[[], None]] = []
    announcer = Announcer(lambda *arguments: calls.append(arguments), queue.append)
    stored = announcer.on_layer((Stretch("a", 0, 32, ((1, 2),)), Stretch("b", 16, 20, ((3,),))))
    for layer in range(3):
        stored(layer)
    assert len(queue) == 1
    queue.pop()()
    assert calls == [("a", (0, 1, 2), 0, 32, ((1, 2),)), ("b", (0, 1, 2), 16, 20, ((3,),))]
    stored(3)
    announcer.on_layer((Stretch("a", 32, 40, ((1, 2),)),))(0)
    assert len(queue) == 1
    queue.pop()()
    assert [(call[0], call[1], call[2]) for call in calls[2:]] == [("a", (3,), 0), ("b", (3,), 16), ("a", (0,), 32)]


def test_no_layer_is_lost_between_two_threads() -> None:
    from queue import SimpleQueue

    layers: list[int] = []
    queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
    announcer = Announcer(lambda transfer_id, some, *rest: layers.extend(some), queue.put)
    stored = announcer.on_layer((Stretch("a", 0, 1, ((0,),)),))

    def engine() -> None:
        for layer in range(20_000):
            stored(layer)
        queue.put(None)

    thread = Thread(target=engine)
    thread.start()
    while (call := queue.get(timeout=10)) is not None:
        call()
    thread.join()
    assert layers == list(range(20_000))

"""Spans: nothing is kept unless somebody records, no more than was asked for, and those of a thread lie within one another or apart."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
from diptych.core.errors import Overloaded
from diptych.core.recordings import Doing, Recorded, Span
from diptych.core.spans import Recording, span
from diptych.core.threads import thread_times


@pytest.fixture
def recording() -> Iterator[Recording]:
    yield (recording := Recording(60.0, 1000))
    if not recording.ended:
        recording.end()


def kept(recorded: Recorded, *doings: Doing) -> list[Span]:
    """Without the garbage collector's, which come when they come."""
    return [each for each in recorded.spans if each.doing is not Doing.COLLECT and (not doings or each.doing in doings)]


def test_nothing_is_kept_while_nobody_records() -> None:
    before = span(Doing.STEP, 1, ("a",))
    with before as one, span(Doing.INPUTS) as other:
        other.rename(Doing.IDLE)
        assert one is other is before, "one object for all, that keeps nothing"
    recording = Recording(60.0, 1000)
    with before:
        pass
    assert kept(recording.end()) == []
    assert span(Doing.STEP) is before


def test_a_span_has_its_step_its_thread_and_what_it_took(recording: Recording) -> None:
    with span(Doing.WAIT) as waiting, span(Doing.INPUTS, 7):
        waiting.rename(Doing.IDLE)
    with pytest.raises(ArithmeticError), span(Doing.STEP, 7, ("a", "b")):
        raise ArithmeticError
    recorded = recording.end()
    inner, outer, failed = kept(recorded)
    assert [each.doing for each in (inner, outer, failed)] == [Doing.INPUTS, Doing.IDLE, Doing.STEP]
    assert (inner.step, outer.step, failed.step, failed.who) == (7, -1, 7, ("a", "b"))
    assert recorded.began <= outer.began <= inner.began <= inner.ended <= outer.ended <= failed.began <= failed.ended <= recorded.ended
    assert {each.thread for each in recorded.spans} == {threading.get_native_id()}
    assert all(each.on_core >= 0 for each in recorded.spans)


def test_of_too_many_the_last_are_kept() -> None:
    recording = Recording(60.0, 10)
    gc.disable()
    for step in range(25):
        with span(Doing.STEP, step):
            pass
    recorded = recording.end()
    gc.enable()
    assert [each.step for each in recorded.spans] == list(range(15, 25))
    assert recorded.lost == 15


def test_it_ends_by_itself() -> None:
    recording = Recording(1e-9, 10)
    with span(Doing.STEP):
        pass
    recorded = recording.end()
    assert recorded.spans == ()
    assert recorded.ended - recorded.began <= 1


def test_one_recording_at_a_time(recording: Recording) -> None:
    with pytest.raises(Overloaded, match="recorded already"):
        Recording(1.0, 1)
    with span(Doing.STEP):
        pass
    assert len(kept(recording.end())) == 1
    Recording(1.0, 1).end()


def test_what_lets_others_run_and_ends_after_them_is_not_kept(recording: Recording) -> None:
    """Two tasks on one thread, each in a span around an await: the first to begin is the first to end."""

    async def both() -> None:
        begun, over = asyncio.Event(), asyncio.Event()

        async def first() -> None:
            with span(Doing.WRITE, 1):
                begun.set()
                await over.wait()

        task = asyncio.create_task(first())
        await begun.wait()
        with span(Doing.WRITE, 2):
            over.set()
            await task
            with span(Doing.FORMAT, 3):
                pass

    asyncio.run(both())
    assert [each.step for each in kept(recording.end(), Doing.WRITE, Doing.FORMAT)] == [3, 2]


def test_threads_record_at_once_and_each_for_itself(recording: Recording) -> None:
    start = threading.Barrier(4)

    def work(step: int) -> None:
        start.wait()
        for _ in range(50):
            with span(Doing.STEP, step), span(Doing.INPUTS, step):
                pass

    threads = [threading.Thread(target=work, args=(step,)) for step in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorded = recording.end()
    assert len(kept(recorded)) == 400
    assert recorded.lost == 0
    for step in range(4):
        mine = kept(recorded, Doing.STEP)
        mine = [each for each in mine if each.step == step]
        assert len({each.thread for each in mine}) == 1
        assert all(early.ended <= late.began for early, late in pairwise(mine))


def test_the_collector_is_recorded_and_let_go(recording: Recording) -> None:
    callbacks = len(gc.callbacks)
    gc.collect()
    recorded = recording.end()
    assert ("generation 2",) in [each.who for each in recorded.spans if each.doing is Doing.COLLECT]
    assert len(gc.callbacks) == callbacks - 1


def test_threads_times_grow_and_have_names() -> None:
    leave = threading.Event()
    thread = threading.Thread(target=leave.wait, name="the one")
    before = {each.thread: each for each in thread_times()}
    thread.start()
    sum(range(1_000_000))
    after = {each.thread: each for each in thread_times()}
    leave.set()
    thread.join()
    mine = threading.get_native_id()
    assert after[thread.native_id or 0].name == "the one"
    assert after[mine].ran > before[mine].ran
    assert after[mine].since(before[mine]).ran == after[mine].ran - before[mine].ran
    assert after[mine].since(None) == after[mine]

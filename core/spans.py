"""Where a process' time goes, as spans: nothing is kept unless somebody records, and then no more than was asked for.

As with `logging` there is one tape for a process: what is to be measured lies in six rooms and on as many threads. A span that nobody
records costs 0.2 us, of which a decode step has some twenty.
"""

from __future__ import annotations

import gc
from collections import defaultdict, deque
from itertools import count
from threading import get_native_id
from time import monotonic_ns, thread_time_ns

from .errors import Overloaded
from .recordings import Doing, Recorded, Span
from .threads import thread_times


class _Tape:
    def __init__(self, seconds: float, most: int) -> None:
        self.began = monotonic_ns()
        self.until = self.began + int(seconds * 1e9)
        self.spans: deque[tuple[Doing, int, int, int, int, int, tuple[str, ...]]] = deque(maxlen=most)
        self.number = count()
        self.threads = thread_times()
        self.under_way: defaultdict[int, list[_Open]] = defaultdict(list)
        """By thread, the outermost first."""


class _Nothing:
    """A span that nobody records."""

    __slots__ = ()

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        return None

    def rename(self, doing: Doing) -> None:
        return None


class _Open:
    """A span under way."""

    __slots__ = ("_around", "_began", "_doing", "_ran", "_step", "_tape", "_thread", "_who")

    def __init__(self, tape: _Tape, doing: Doing, step: int, who: tuple[str, ...]) -> None:
        self._tape, self._doing, self._step, self._who = tape, doing, step, who

    def __enter__(self) -> _Open:
        self._thread = get_native_id()
        self._around = self._tape.under_way[self._thread]
        self._around.append(self)
        self._began = monotonic_ns()
        self._ran = thread_time_ns()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        on_core = thread_time_ns() - self._ran
        ended = monotonic_ns()
        tape, innermost = self._tape, self._around[-1] is self
        self._around.remove(self)
        if innermost and ended <= tape.until:  # else a task wrote to a client that does not read, and others have had the thread meanwhile
            next(tape.number)
            tape.spans.append((self._doing, self._thread, self._began, ended, on_core, self._step, self._who))

    def rename(self, doing: Doing) -> None:
        """It has turned out to be about something else."""
        self._doing = doing


_NOTHING = _Nothing()
_tape: _Tape | None = None


def span(doing: Doing, step: int = -1, who: tuple[str, ...] = ()) -> _Nothing | _Open:
    """Use as `with span(…):`. One that has ended after another which began within it, around an `await`, is not kept: the spans of a thread
    lie within one another or apart."""
    tape = _tape  # read once: another thread may end the recording in between
    return _NOTHING if tape is None else _Open(tape, doing, step, who)


class Recording:
    """Begins at once; ends with `end`, or by itself after `seconds`. Of more than `most` spans the last are kept."""

    def __init__(self, seconds: float, most: int) -> None:
        """Raises `Overloaded` if one is under way in this process."""
        global _tape
        if _tape is not None:
            raise Overloaded("This process is being recorded already; only one recording runs at a time.")
        self._mine = _tape = _Tape(seconds, most)
        self._collecting: _Open | None = None
        self.ended = False
        gc.callbacks.append(self._collects)

    def end(self) -> Recorded:
        """What there is; to be called once."""
        global _tape
        _tape = None
        self.ended = True
        gc.callbacks.remove(self._collects)
        mine = self._mine
        kept = list(mine.spans)  # one call without Python code in it: a thread in a span may be adding to them
        before = {thread.thread: thread for thread in mine.threads}
        threads = tuple(thread.since(before.get(thread.thread)) for thread in thread_times())
        ended = min(monotonic_ns(), mine.until)
        return Recorded(mine.began, ended, tuple(Span(*each) for each in kept), threads, next(mine.number) - len(kept))

    def _collects(self, phase: str, facts: dict[str, int]) -> None:
        """The collector's callback: on the thread that happened to ask for memory, while every other waits for the interpreter."""
        if phase == "start":
            self._collecting = _Open(self._mine, Doing.COLLECT, -1, (f"generation {facts['generation']}",))
            self._collecting.__enter__()
        elif self._collecting is not None:
            self._collecting.__exit__(None, None, None)
            self._collecting = None

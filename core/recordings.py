"""What is recorded of where a process' time goes, and what one process says to have another recorded. `core.spans` records."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Doing(StrEnum):
    """What a span is about. A span lies within the one that was begun before it on its thread, if that has not ended."""

    # The engine's thread: one of the first three, then a step, again and again.
    IDLE = "idle"
    """There is nothing to compute."""
    WAIT = "wait for a decision"
    """There is, and the engine has not yet been told."""
    UNDER_WAY = "wait for a step under way"
    """Nor need it be: a GPU, or the other stages of the worker, still compute a step before. Or a thread waits for the output of one."""
    STEP = "step"
    COPY_BLOCKS = "copy forked blocks"
    INPUTS = "inputs"
    FORWARD = "model"
    SAMPLE = "sampling"
    ANNOUNCE = "announce a layer"
    TELL_RANKS = "tell the other ranks"
    # The loop's thread.
    TURN = "turn"
    HEAR = "hear"
    COMPLETE = "take the output"
    DECIDE = "schedule"
    TELL = "hand over to asyncio"
    REPORT = "report"
    # The thread of asyncio, at workers.
    DELIVER = "deliver"
    TRANSFER = "transfers' messages"
    # Threads of transfers.
    COPY = "copy a piece"
    PACK = "pack a piece"
    UNPACK = "unpack a piece"
    # Both ends of a stream.
    ENCODE = "encode a message"
    DECODE = "decode a message"
    # The router.
    COMMAND = "command a worker"
    """Of a request (the first of `who`), by an attempt (the second)."""
    RECEIVE = "receive a step"
    EMIT = "a request's tokens"
    DETOKENISE = "detokenise"
    FORMAT = "format an event"
    WRITE = "write to the client"
    # Any.
    COLLECT = "collect garbage"


@dataclass(frozen=True, slots=True)
class ThreadTime:
    """`thread`: its native id. `ran`: ns on a core; `ready`: ns in which it could have run and no core was free."""

    thread: int
    name: str
    ran: int
    ready: int

    def since(self, before: ThreadTime | None) -> ThreadTime:
        """What it has taken since then; since it began if there was none."""
        return self if before is None else ThreadTime(self.thread, self.name, self.ran - before.ran, self.ready - before.ready)


@dataclass(frozen=True, slots=True)
class Span:
    """`began` and `ended`: ns of the monotonic clock. `on_core`: ns that the thread ran meanwhile; the rest it waited, for a core, the
    interpreter or something else. `thread`: its native id. `step`: the engine's number, -1 where none is known; `who`: attempts or
    requests it is about."""

    doing: Doing
    thread: int
    began: int
    ended: int
    on_core: int
    step: int = -1
    who: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a recording has. `began`, `ended`: ns of the monotonic clock. `lost`: spans that were too many, the oldest. `threads`: what each
    thread of the process did meanwhile, the recorded ones and all others."""

    began: int
    ended: int
    spans: tuple[Span, ...]
    threads: tuple[ThreadTime, ...]
    lost: int = 0


@dataclass(frozen=True, slots=True)
class BeginSpans:
    """Record for `seconds` at most; of more than `most` spans keep the last."""

    seconds: float
    most: int


@dataclass(frozen=True, slots=True)
class EndSpans:
    """End the recording, and tell it."""


SpansCommand = BeginSpans | EndSpans


@dataclass(frozen=True, slots=True)
class SpansBegun:
    """The recording has begun. Processes of one `host` have one clock; `now`: ns on it."""

    host: str
    now: int
    pid: int


@dataclass(frozen=True, slots=True)
class SpansTold:
    """Some of what was recorded, in the order of the spans' ends."""

    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class SpansEnded:
    """The last answer; the fields as in `core.spans.Recorded`."""

    began: int
    ended: int
    threads: tuple[ThreadTime, ...]
    lost: int


SpansAnswer = SpansBegun | SpansTold | SpansEnded

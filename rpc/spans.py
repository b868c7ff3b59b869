"""Having another process of the cluster recorded: the end that is recorded, served beside its other calls, and the end that asks."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns

from ..core.errors import InvalidRequest, Unavailable
from ..core.recordings import BeginSpans, EndSpans, Recorded, Span, SpansAnswer, SpansBegun, SpansCommand, SpansEnded, SpansTold
from ..core.security import TlsFiles
from ..core.spans import Recording
from ..proto.worker_pb2 import DESCRIPTOR
from .channels import ANSWER_S, ClientCall, open_internal_channel
from .codec_spans import decode_spans_answer, decode_spans_command, encode_spans_answer, encode_spans_command
from .stream import ByteCall, Stream, alone

LONGEST_S = 600.0
MOST = 1_000_000
"""Spans of a recording; one takes 0.3 KiB until it is told."""
AT_ONCE = 2_000
"""Spans in one answer: making it takes 1 ms, and what else the process serves waits for it."""


def _host() -> str:
    """What no two hosts share, and all processes of one do: they have one monotonic clock."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class SpansServed(Stream[SpansAnswer, SpansCommand]):
    """The end that is recorded."""

    def __init__(self, call: ByteCall, *, peer: str) -> None:
        super().__init__(call, encode_spans_answer, alone(decode_spans_command), peer=peer)


async def serve_spans(stream: SpansServed) -> None:
    """Record this process from the first command until the second, or until the stream ends. Raises `InvalidRequest` for one that asks
    for what may not be, `Overloaded` while another recording runs."""
    begin = await anext(stream, None)
    if begin is None:
        return
    recording = _begin(begin)
    stream.send(SpansBegun(_host(), monotonic_ns(), os.getpid()))
    try:
        await anext(stream, None)
    finally:
        recorded = await asyncio.to_thread(recording.end)  # a second of Python where there are very many, that others can interrupt
    for start in range(0, len(recorded.spans), AT_ONCE):
        stream.send(SpansTold(recorded.spans[start : start + AT_ONCE]))
        await asyncio.sleep(0)  # others' turn
    stream.send(SpansEnded(recorded.began, recorded.ended, recorded.threads, recorded.lost))


def _begin(command: SpansCommand) -> Recording:
    if not isinstance(command, BeginSpans):
        raise InvalidRequest("No recording has begun.", field="command")
    if not 0 < command.seconds <= LONGEST_S:
        raise InvalidRequest(f"seconds is {command.seconds:g}; a recording takes more than 0 and at most {LONGEST_S:g} s.", field="seconds")
    if not 0 < command.most <= MOST:
        raise InvalidRequest(f"most is {command.most}; a recording keeps 1 to {MOST} spans.", field="most")
    return Recording(command.seconds, command.most)


@dataclass(frozen=True, slots=True)
class ClockSeen:
    """`host` and `pid` of the other process. What its clock shows is ahead of this process' by `ahead` ns, give or take `unsure`."""

    host: str
    pid: int
    ahead: int
    unsure: int


class SpansClient:
    """Has the worker (or, with `router`, the router) at `address` recorded, on a connection of its own. `begin`, then `end`."""

    def __init__(self, address: str, tls: TlsFiles | None = None, *, router: bool = False) -> None:
        self._peer = f"{'router' if router else 'worker'} at {address}"
        method = DESCRIPTOR.services_by_name["Router" if router else "Worker"].methods_by_name["Spans"]
        call = ClientCall(open_internal_channel(address, tls), method, peer=self._peer, owns_channel=True)
        self._stream: Stream[SpansCommand, SpansAnswer] = Stream(call, encode_spans_command, alone(decode_spans_answer), peer=self._peer)

    async def begin(self, seconds: float, most: int) -> ClockSeen:
        """Returns when the other is being recorded. Raises what it refuses with, `Unavailable` if it does not answer."""
        asked = monotonic_ns()
        self._stream.send(BeginSpans(seconds, most))
        begun = await self._answer()
        heard = monotonic_ns()
        if not isinstance(begun, SpansBegun):
            raise Unavailable(f"{self._peer} answers before it is recorded.")
        if begun.host == _host():
            return ClockSeen(begun.host, begun.pid, 0, 0)
        return ClockSeen(begun.host, begun.pid, begun.now - (asked + heard) // 2, (heard - asked) // 2)

    async def end(self) -> Recorded:
        """What was recorded. Raises `Unavailable` if the other has ended meanwhile."""
        spans: list[Span] = []
        self._stream.send(EndSpans())
        while not isinstance(answer := await self._answer(), SpansEnded):
            if isinstance(answer, SpansTold):
                spans += answer.spans
        return Recorded(answer.began, answer.ended, tuple(spans), answer.threads, answer.lost)

    async def _answer(self) -> SpansAnswer:
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await anext(self._stream, None)
        except TimeoutError:
            raise Unavailable(f"{self._peer} has not answered within {ANSWER_S:g} s.") from None
        if answer is None:
            raise Unavailable(f"{self._peer} ended the stream.")
        return answer

    async def close(self) -> None:
        """End the stream; a recording that runs ends too."""
        await self._stream.wait_closed()

"""One worker of the fleet as this router is connected to it: the stream of commands and events, and the Watch that says it lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from ..core.commands import ChoiceFinished, Command, Decode, Event, Failed, Finished, HandedOver, Movable, Prefill, StepEvents, Stop
from ..core.errors import DiptychError
from ..core.fleet import Member, WorkerReport
from ..core.metrics import Recorder
from ..core.recordings import Doing
from ..core.security import TlsFiles
from ..core.spans import span
from ..rpc.worker import WorkerClient, WorkerStream
from .placement import Candidate
from .reported import Reported

log = logging.getLogger(__name__)

SILENCE_S = 20.0
"""A worker reports at least once a second; without a report for this long its process hangs, and it counts as lost. A process that is
dead, stopped or cut off is found by the connection's own probes (`rpc/channels.py`, 6 s), which grpc answers without Python: a worker
that is only slow, on a host with too much to do, is not taken for lost."""
LISTENS = 10
"""Silence is counted in this many parts, each a turn of our own loop: a router that was itself held up has not listened meanwhile."""
_BACKOFF_S = (0.05, 2.0)
"""First and longest pause before connecting again; it doubles in between."""
_TERMINAL = (HandedOver, Finished, Failed)


class Listener(Protocol):
    """Who opened an attempt: told what the worker says of it, or that its stream is gone. Must not raise."""

    def event(self, worker_id: str, event: Event) -> None: ...

    def lost(self, worker_id: str) -> None: ...


@dataclass(slots=True)
class _Open:
    listener: Listener
    prompt_tokens: int
    choices: set[int]
    """Those not yet ended."""


class Link:
    """Keeps connecting until closed. `report` is None while the worker is not known to live."""

    def __init__(
        self, member: Member, recorder: Recorder, changed: Callable[[], None], *, silence_s: float = SILENCE_S, tls: TlsFiles | None = None
    ) -> None:
        """Starts at once; needs a running event loop. `changed` is called when the worker comes, goes or changes its state."""
        self.member = member
        self.report: WorkerReport | None = None
        self._reported = Reported(member, recorder)
        self._changed = changed
        self._silence_s = silence_s
        self._client = WorkerClient(member.address, tls)
        self._stream: WorkerStream | None = None
        self._open: dict[str, _Open] = {}
        self._silence: asyncio.TimerHandle | None = None
        self._listened = 0
        self.show()
        self._tasks = (asyncio.create_task(self._keep(self._attach)), asyncio.create_task(self._keep(self._watch)))

    def show(self) -> None:
        """Record what the worker has said of itself."""
        self._reported.show(self.report)

    def candidate(self) -> Candidate:
        connected = self._stream is not None and not self._stream.ended
        prompt_tokens = sum(opened.prompt_tokens for opened in self._open.values())
        choices = sum(len(opened.choices) for opened in self._open.values())
        return Candidate(self.member, self.report if connected else None, choices, prompt_tokens)

    def send(self, command: Command, listener: Listener) -> None:
        """Never blocks. The answers, or the loss of the stream, come to `listener` later, never from inside this call."""
        if isinstance(command, Stop):
            self._stop(command)
            return
        computes_prompt = isinstance(command, Prefill) or (isinstance(command, Decode) and command.local_prefill)
        request = command.request
        self._open[command.attempt_id] = _Open(listener, len(request.token_ids) if computes_prompt else 0, set(request.live))
        if self._stream is None or self._stream.ended:
            asyncio.get_running_loop().call_soon(self._lose, "it is not connected")
            return
        self._stream.send(command)

    def _stop(self, command: Stop) -> None:
        opened = self._open.get(command.attempt_id)
        if opened is None:
            return
        if command.choice is None:
            del self._open[command.attempt_id]
        else:
            opened.choices.discard(command.choice)
        if self._stream:
            self._stream.send(command)

    async def close(self) -> None:
        """The worker left the fleet: what it still does for us is lost."""
        self._lose("it left the fleet")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    async def _keep(self, connect: Callable[[], Awaitable[bool]]) -> None:
        """Run `connect` again whenever it ends; the pause grows while nothing is heard."""
        pause, longest = _BACKOFF_S
        while True:
            try:
                heard = await connect()
            except DiptychError as error:
                heard = False
                log.debug("worker %s: %s", self.member.worker_id, error)
            except Exception:
                # A defect here must not leave the worker unconnected for good.
                heard = False
                log.exception("worker %s: a defect in the router", self.member.worker_id)
            pause = _BACKOFF_S[0] if heard else min(longest, pause * 2)
            await asyncio.sleep(pause)

    async def _attach(self) -> bool:
        stream = self._stream = self._client.attach()
        self._changed()
        heard = False

        def receive(step: StepEvents) -> None:
            nonlocal heard
            heard = True
            with span(Doing.RECEIVE):
                self._dispatch(step)

        try:
            await stream.each(receive)
        finally:
            stream.close()
            self._lose("its stream ended")
        return heard

    async def _watch(self) -> bool:
        reports = self._client.watch()
        heard = False
        try:
            async for report in reports:
                heard = True
                if report.incarnation != self.member.incarnation:
                    log.info("worker %s has restarted; waiting for the fleet to say so", self.member.worker_id)
                    return False
                self._take(report)
        finally:
            await reports.aclose()
        return heard

    def _dispatch(self, step: StepEvents) -> None:
        for event in step.events:
            opened = self._open.get(event.attempt_id)
            if opened is None:
                continue
            if isinstance(event, _TERMINAL):
                del self._open[event.attempt_id]
            elif not isinstance(event, Movable):
                # Any other event is about what comes behind the prompt: it has been read.
                opened.prompt_tokens = 0
            if isinstance(event, ChoiceFinished):
                opened.choices.discard(event.choice)
            opened.listener.event(self.member.worker_id, event)

    def _take(self, report: WorkerReport) -> None:
        if self._silence is None:
            self._listen()
        self._listened = 0
        before, self.report = self.report, report
        if before is None or before.state is not report.state:
            log.info("worker %s is %s", self.member.worker_id, report.state.value)
            self.show()
            self._changed()

    def _listen(self) -> None:
        self._silence = asyncio.get_running_loop().call_later(self._silence_s / LISTENS, self._listened_on)

    def _listened_on(self) -> None:
        self._listened += 1
        if self._listened <= LISTENS:
            self._listen()
            return
        if self._stream:
            # The worker may yet come to itself: a closed stream tells it to stop what is ours.
            self._stream.close()
        self._lose(f"it said nothing for {self._silence_s:g} s")

    def _lose(self, why: str) -> None:
        """Everything open is lost, and nothing is placed here until the worker has reported again."""
        if self._silence:
            self._silence.cancel()
            self._silence = None
        if self.report is not None or self._open:
            level = logging.WARNING if self._open else logging.INFO
            log.log(level, "worker %s is lost: %s (%d attempts open)", self.member.worker_id, why, len(self._open))
        self.show()  # the last it said, before it is gone
        self.report = None
        self.show()
        self._changed()
        lost, self._open = self._open, {}
        for opened in lost.values():
            opened.listener.lost(self.member.worker_id)

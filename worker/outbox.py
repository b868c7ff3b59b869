"""What the engine loop has to say to the asyncio side, gathered over one turn and carried across in one piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..core.commands import Event, StepEvents
from ..core.fleet import WorkerReport

Call = Callable[[], None]
"""A call with its arguments bound (`functools.partial`), to be made on the other thread."""


class Listener(Protocol):
    """The way back to one router: its stream."""

    def send(self, events: StepEvents) -> None:
        """Queue the events; never blocks, and a stream that has ended drops them."""
        ...


@dataclass(frozen=True, slots=True)
class Delivery:
    """One turn's words: calls in order, then one `StepEvents` per router, then what the worker reports of itself."""

    calls: tuple[Call, ...]
    events: tuple[tuple[Listener, StepEvents], ...]
    report: WorkerReport | None
    idle: bool


class Outbox:
    """Filled by a role on the loop's thread, emptied by the loop."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._events: dict[Listener, list[Event]] = {}
        self.wants_report = False
        """The worker's report is to go out with this turn, though steps run."""

    def __bool__(self) -> bool:
        return bool(self._calls or self._events)

    def call(self, call: Call) -> None:
        """Have `call` made on the asyncio thread, after those before it."""
        self._calls.append(call)

    def say(self, listener: Listener, event: Event) -> None:
        """Tell a router; its events keep their order."""
        self._events.setdefault(listener, []).append(event)

    def take(self, report: WorkerReport | None = None, *, idle: bool = False) -> Delivery:
        """Everything gathered since the last take."""
        events = tuple((listener, StepEvents(tuple(said))) for listener, said in self._events.items())
        delivery = Delivery(tuple(self._calls), events, report, idle)
        self._calls, self._events = [], {}
        self.wants_report = self.wants_report and report is None
        return delivery

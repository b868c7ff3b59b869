"""The attempts a router still awaits the end of, and the way to tell it."""

from __future__ import annotations

from collections.abc import Callable

from ..core.commands import Event, Failed, Finished, HandedOver
from .outbox import Listener, Outbox

Terminal = HandedOver | Finished | Failed


class Attempts:
    """Sees to it that an attempt has one terminal event and nothing after it; what is said of one that has ended is dropped."""

    def __init__(self, outbox: Outbox, ended: Callable[[Terminal], None] = lambda event: None) -> None:
        """`ended` is told the end of every attempt too."""
        self._outbox, self._ended = outbox, ended
        self._listeners: dict[str, Listener] = {}

    def __len__(self) -> int:
        return len(self._listeners)

    def __contains__(self, attempt_id: str) -> bool:
        return attempt_id in self._listeners

    def open(self, attempt_id: str, listener: Listener) -> None:
        self._listeners[attempt_id] = listener

    def belongs(self, attempt_id: str, listener: Listener) -> bool:
        """Whether the attempt is open and this router's."""
        return self._listeners.get(attempt_id) is listener

    def tell(self, event: Event) -> None:
        """An event that is not the last."""
        if (listener := self._listeners.get(event.attempt_id)) is not None:
            self._outbox.say(listener, event)

    def end(self, event: Terminal) -> bool:
        """The last event of its attempt. False if that had ended already."""
        listener = self._listeners.pop(event.attempt_id, None)
        if listener is not None:
            self._outbox.say(listener, event)
            self._ended(event)
        return listener is not None

    def forget(self, listener: Listener) -> list[str]:
        """The router is gone: its attempts, which are open no longer."""
        gone = [attempt_id for attempt_id, owner in self._listeners.items() if owner is listener]
        for attempt_id in gone:
            del self._listeners[attempt_id]
        return gone

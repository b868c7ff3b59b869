"""An HTTP connection that cannot be held for nothing: uvicorn's HTTP/1.1 protocol with two more limits.

Without them a client that sends half a request, or never reads its answer, keeps a connection (and its request) for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

LINGER_BYTES = 16 << 20
"""Of a body that was refused so much is read and dropped, so that a client which reads only when it has sent all still gets its answer, and
keeps its connection."""


def limited_protocol(*, read_s: float, write_s: float) -> type[H11Protocol]:
    """A protocol class for `uvicorn.Config(http=…)`. A request must have come whole `read_s` seconds after the connection or its first
    byte; a client must take something within `write_s` seconds of its buffers being full. Else the connection is cut."""

    class LimitedProtocol(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._reading: asyncio.TimerHandle | None = None
            self._writing: asyncio.TimerHandle | None = None
            self._dropped = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._reading = self.loop.call_later(read_s, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            refused = self.conn.their_state is h11.SEND_BODY and self.conn.our_state in (h11.DONE, h11.MUST_CLOSE)
            self._dropped = self._dropped + len(data) if refused else 0
            if self._dropped > LINGER_BYTES:
                self.transport.abort()
            if not self._half_read():
                _stop(self._reading)
                self._reading = None
            elif self._reading is None:
                self._reading = self.loop.call_later(read_s, self.transport.abort)

        def _half_read(self) -> bool:
            if self.conn.their_state is h11.SEND_BODY:
                return True
            return self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])

        def send_400_response(self, msg: str) -> None:
            try:
                super().send_400_response(msg)
            except h11.LocalProtocolError:
                # Garbage behind a request that is being answered: no second answer can be begun.
                self.transport.abort()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing = self.loop.call_later(write_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            _stop(self._writing)
            self._writing = None

        def connection_lost(self, exc: Exception | None) -> None:
            _stop(self._reading)
            self._reading = None
            _stop(self._writing)
            self._writing = None
            super().connection_lost(exc)
            # Of a connection that was reset uvicorn lets the timer run on, and with it all that the connection held: 65 s each.
            self._unset_keepalive_if_required()

    return LimitedProtocol


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer:
        timer.cancel()

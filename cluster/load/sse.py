"""Server-sent events from bytes as they come (WHATWG HTML §9.2.6), as far as OpenAI's answers use them: the data of each event."""

from __future__ import annotations


class EventReader:
    """Feed it bytes cut anywhere; it returns the data of every event that is complete with them."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """Lines end with LF or CR LF. Fields other than `data`, and comments, are passed over."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events

"""A server that answers by script and writes down when it sent what: the truth that a client's times are compared with."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Event = tuple[float, int]
"""Seconds to wait before it, and the tokens it carries."""


@dataclass
class Script:
    """How it answers. `refuses`: top-level fields, or `ids` for prompts as ids, that it answers with 400. `usage`: never, last, every.
    `cut_after`, `error_after`: events behind which the connection is closed, or an error is sent. `status`: of every answer."""

    events: Callable[[int], list[Event]] = lambda number: [(0.0, 1)] * 4
    refuses: frozenset[str] = frozenset()
    usage: str = "every"
    token_ids: bool = False
    timing: bool = True
    cut_after: int | None = None
    error_after: int | None = None
    status: int = 200
    first_waits_for: int = 0
    """The first request is answered when so many have come."""


@dataclass
class Served:
    """One request as the server saw it. `sent[i]`: when event i was written, on `time.perf_counter`."""

    body: dict[str, Any]
    accepted: float
    sent: list[float] = field(default_factory=list)


@dataclass
class ScriptedServer:
    script: Script
    url: str = ""
    served: list[Served] = field(default_factory=list)
    answering: set[asyncio.Task[None]] = field(default_factory=set)

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self.answering.add(task)
        task.add_done_callback(self.answering.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the client left
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        accepted = time.perf_counter()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0)
        raw = await reader.readexactly(length)
        if head.startswith("get"):
            return self._whole(writer, 200, {"data": [{"id": "scripted"}]})
        body = json.loads(raw)
        if refused := self._refused(body):
            return self._whole(writer, 400, {"error": {"message": f"{refused}: unknown field.", "code": "invalid_request"}})
        if self.script.status != 200:
            return self._whole(writer, self.script.status, {"error": {"message": "No.", "code": "overloaded"}})
        served = Served(body, accepted)
        self.served.append(served)
        await self._stream(served, writer)

    def _refused(self, body: dict[str, Any]) -> str | None:
        fields = {*body, *body.get("stream_options", {}), *({"ids"} if isinstance(body["prompt"], list) else ())}
        return min(fields & self.script.refuses, default=None)

    def _whole(self, writer: asyncio.StreamWriter, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)

    async def _stream(self, served: Served, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        if len(self.served) == 1:
            while len(self.served) < self.script.first_waits_for:  # noqa: ASYNC110  others append to it
                await asyncio.sleep(0.001)
        written = 0
        for number, (wait, tokens) in enumerate(self.script.events(len(self.served) - 1)):
            if number == self.script.cut_after:
                return
            if number == self.script.error_after:
                await self._event(writer, {"error": {"message": "Gone.", "code": "unavailable"}})
                writer.write(b"0\r\n\r\n")
                return
            if wait:
                await asyncio.sleep(wait)
            written += tokens
            served.sent.append(time.perf_counter())
            await self._event(writer, self._piece(tokens, written))
        if self.script.usage != "never":
            await self._event(writer, self._last(served, written))
        await self._event(writer, None)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def _piece(self, tokens: int, written: int) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": "x" * tokens}
        if self.script.token_ids:
            choice["token_ids"] = [7] * tokens
        usage = {"prompt_tokens": 3, "completion_tokens": written} if self.script.usage == "every" else None
        return {"choices": [choice], "usage": usage}

    def _last(self, served: Served, written: int) -> dict[str, Any]:
        timing = {"timing": {"ttft": served.sent[0] - served.accepted, "transport": "shm"}} if self.script.timing else {}
        return {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": written}, **timing}

    async def _event(self, writer: asyncio.StreamWriter, content: dict[str, Any] | None) -> None:
        data = b"data: " + (b"[DONE]" if content is None else json.dumps(content).encode()) + b"\n\n"
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer(script)
    server = await asyncio.start_server(scripted.connected, "127.0.0.1", 0)
    scripted.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield scripted
    finally:
        server.close()
        for task in scripted.answering:
            task.cancel()
        await asyncio.gather(*scripted.answering, return_exceptions=True)
        await server.wait_closed()

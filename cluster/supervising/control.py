"""The supervisor's ear: `diptych scale` asks a running cluster for another number of workers.

One line of JSON goes in, `{"decode": [3]}`, with a number for each of the phase's groups; lines come back, `{"event": "progress",
"what": …}` and last `done`, or `failed` (message, field). The socket has no file that could be left behind: its name is made of the
cluster's id, in this host's network namespace, and who asks must be the user whose cluster it is.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

from ...core.errors import ConfigError, DiptychError, Unavailable
from ...core.fleet import Phase

LINE_BYTES = 4096

Numbers = Mapping[Phase, tuple[int, ...]]
"""How many workers there shall be in each group of a phase, by the config's order; a phase without groups is one."""
Tell = Callable[[str], None]
"""Shows one line to whoever asked for a change."""
Scale = Callable[[Numbers, Tell], Awaitable[None]]


def _name(cluster_id: str) -> str:
    return f"\0diptych-{cluster_id}"


async def listen(cluster_id: str, scale: Scale) -> asyncio.Server:
    """Answer until closed. A change that was begun goes on when whoever asked for it goes away."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if _user(writer.get_extra_info("socket")) == os.geteuid():
                await _answer(reader, writer, scale)
        finally:  # else whoever asked would wait for ever
            writer.close()

    return await asyncio.start_unix_server(answer, _name(cluster_id), limit=LINE_BYTES)


def _user(peer: socket.socket) -> int:
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, scale: Scale) -> None:
    def say(event: str, **values: object) -> None:
        writer.write(json.dumps({"event": event, **values}).encode() + b"\n")

    try:
        wanted = _read(await reader.readline())
        await scale(wanted, lambda what: say("progress", what=what))
        say("done")
    except DiptychError as error:
        say("failed", message=error.message, field=error.field)


def _read(line: bytes) -> dict[Phase, tuple[int, ...]]:
    try:
        return {Phase(phase): tuple(map(int, numbers)) for phase, numbers in json.loads(line).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{line[:200]!r} are no numbers of workers by phase: {error}", field="workers") from None


def ask(cluster_id: str, wanted: Numbers) -> Iterator[str]:
    """Ask the supervisor of that cluster on this host for so many workers; what it does, line by line, until that is done.

    Raises `ConfigError` for a number that cannot be, `Unavailable` if a worker cannot join or the cluster ends.
    """
    with _connected(cluster_id) as connection, connection.makefile("rw") as lines:
        lines.write(json.dumps({phase.value: numbers for phase, numbers in wanted.items()}) + "\n")
        lines.flush()
        for event in map(json.loads, lines):
            match event["event"]:
                case "progress":
                    yield event["what"]
                case "done":
                    return
                case "failed" if event["field"] is not None:
                    raise ConfigError(event["message"], field=event["field"])
                case "failed":
                    raise Unavailable(event["message"])
    raise Unavailable("The cluster has ended, or is another user's.")


@contextmanager
def _connected(cluster_id: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(_name(cluster_id))
        except ConnectionRefusedError:
            raise Unavailable("The cluster is still starting, or ends.") from None
        try:
            yield connection
        except (ConnectionResetError, BrokenPipeError):  # the supervisor was killed, or does not listen to this user
            raise Unavailable("The cluster has ended, or is another user's.") from None

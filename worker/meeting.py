"""How the ranks of a worker find each other: followers come to the leader, say who they are, and are let in or refused by name.

The leader listens before it loads anything, and takes who has come when it has loaded torch: its followers load theirs meanwhile.
"""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass, fields

from ..core.errors import ConfigError, DiptychError, Unavailable
from ..core.layout import Layout
from ..core.plain_json import from_json, to_json
from ..core.security import TlsFiles
from ..rpc.channels import join_address, split_address
from .channel import Connection, Kind, hear, say
from .secure import accepted, connected

MEETING_S = 3600.0
"""Longest time until all ranks are there, and until each has loaded: on another node a rank may first have the model to download and to
prepare. Who dies meanwhile ends its worker at once, so this ends only what nobody is to blame for."""
HELLO_S = 5.0
"""Who connects says Hello at once. A stranger that says nothing keeps the others waiting for so long."""
GREETING = b"diptych rank 1\n"
"""Before every Hello: the protocol of the channel and its version."""
HELLO_BYTES = 1 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hello:
    """A rank, and what must be the same at all ranks of a worker. `layout`: the worker's; `slots`: the engine's."""

    rank: int
    worker_id: str
    layout: Layout
    slots: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """`field`: of the Hello, or of its layout."""

    message: str
    field: str


def listen(host: str) -> socket.socket:
    """Where followers are to come, on a port that the kernel chooses. Raises `ConfigError` if this machine has no such address."""
    try:
        return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=64)
    except OSError as error:
        raise ConfigError(f"The ranks of this worker cannot meet at {host}: {error}.", field="listen") from None


def address_of(listener: socket.socket, host: str) -> str:
    return join_address(host, listener.getsockname()[1])


def meet(listener: socket.socket, ours: Hello, *, tls: TlsFiles | None = None, within_s: float = MEETING_S) -> dict[int, Connection]:
    """The leader's: connections to all other ranks, which know it; closes `listener`. With `tls` who has no certificate of the cluster is
    no rank. Raises `Unavailable` if one leaves again, or does not come."""
    there: dict[int, Connection] = {}
    try:
        _await_all(listener, ours, there, tls, within_s)
        for rank, connection in there.items():
            _welcome(rank, connection)
    except BaseException:
        for connection in there.values():
            connection.close()
        raise
    return there


def _await_all(listener: socket.socket, ours: Hello, there: dict[int, Connection], tls: TlsFiles | None, within_s: float) -> None:
    late = time.monotonic() + within_s
    with listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while missing := set(range(1, ours.layout.ranks)) - there.keys():
            ready = selector.select(max(0.0, late - time.monotonic()))
            if not ready:
                raise Unavailable(f"Of the ranks of this worker {sorted(missing)} have not come within {within_s:g} s.")
            for key, _ in ready:
                if key.fileobj is not listener:  # it is to say no more until it is welcome
                    raise _gone(key.data)
                if (come := _receive(listener, ours, there, tls)) is not None:
                    rank, connection = come
                    there[rank] = connection
                    selector.register(connection, selectors.EVENT_READ, rank)


def _welcome(rank: int, connection: Connection) -> None:
    try:
        say(connection, Kind.WELCOME, b"")
    except OSError:
        raise _gone(rank) from None


def _gone(rank: int) -> Unavailable:
    return Unavailable(f"Rank {rank} of this worker has gone before the others were there.")


def join(leader: str, ours: Hello, *, tls: TlsFiles | None = None, within_s: float = MEETING_S) -> Connection:
    """A follower's: a connection to its leader, when all ranks are there. Raises `ConfigError` if it is refused, `Unavailable` if there
    is no leader, or no longer."""
    host, port = split_address(leader)
    try:
        connection = connected(socket.create_connection((host, port), timeout=within_s), tls)
        say(connection, Kind.HELLO, GREETING + to_json(ours))
        heard = hear(connection, HELLO_BYTES)
    except (OSError, ValueError) as error:
        raise Unavailable(f"Rank {ours.rank} of {ours.worker_id} finds no leader at {leader}: {error}.") from None
    match heard:
        case (Kind.WELCOME, _):
            return connection
        case (Kind.REFUSED, payload):
            refusal = from_json(Refusal, payload)
            raise ConfigError(refusal.message, field=refusal.field)
    raise Unavailable(f"The leader of {ours.worker_id} at {leader} has gone.")


def _receive(listener: socket.socket, ours: Hello, there: dict[int, Connection], tls: TlsFiles | None) -> tuple[int, Connection] | None:
    """Who has come, if it is one of ours."""
    plain, (host, port, *_) = listener.accept()
    try:
        plain.settimeout(HELLO_S)
        connection = accepted(plain, tls)
        hello = _hello(hear(connection, HELLO_BYTES))
        refusal = refused(ours, hello, there)
        if refusal is None:
            return hello.rank, connection
        log.warning("refused a rank that came from %s: %s", host, refusal.message)
        say(connection, Kind.REFUSED, to_json(refusal))
    except (OSError, ValueError, DiptychError) as error:
        log.warning("somebody came from %s to where the ranks of this worker meet, and is none: %s", join_address(host, port), error)
    plain.close()
    return None


def _hello(heard: tuple[Kind, bytes] | None) -> Hello:
    if heard is None or heard[0] is not Kind.HELLO or not heard[1].startswith(GREETING):
        raise ValueError("it does not say Hello as we do")
    return from_json(Hello, heard[1][len(GREETING) :])


def refused(ours: Hello, theirs: Hello, there: Collection[int] = ()) -> Refusal | None:
    """Why `theirs` is no rank of the worker that `ours` leads, beside the ranks that are `there`; None if it is one."""
    ranks, rank = ours.layout.ranks, theirs.rank
    if theirs.worker_id != ours.worker_id:
        return Refusal(f"This is the leader of {ours.worker_id}, not of {theirs.worker_id}.", "worker_id")
    for mine, its in ((ours.layout, theirs.layout), (ours, theirs)):
        for name in (field.name for field in fields(mine) if field.name not in ("rank", "layout")):
            if (here := getattr(mine, name)) != (other := getattr(its, name)):
                return Refusal(f"{name} differs in {ours.worker_id}: {here} at its leader, {other} at rank {rank}.", name)
    if not 0 < rank < ranks:
        return Refusal(f"{ours.worker_id} has the ranks 1 to {ranks - 1} beside its leader, and no rank {rank}.", "rank")
    if rank in there:
        return Refusal(f"Rank {rank} of {ours.worker_id} is there already.", "rank")
    return None

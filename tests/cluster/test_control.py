"""The supervisor's ear, over its real socket."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

import pytest
from diptych.cluster.supervising.control import Numbers, Tell, _connected, ask, listen
from diptych.core.errors import ConfigError, Unavailable
from diptych.core.fleet import Phase

MALFORMED = [b'{"decode": 3}\n', b"\n", b"[]\n", b"3\n", b'{"decode": null}\n', b'{"router": 1}\n', b'{"decode": "many"}\n', b"\xff\n"]


async def no_change(wanted: Numbers, tell: Tell) -> None:
    raise AssertionError(wanted)


async def broken(wanted: Numbers, tell: Tell) -> None:
    tell("One line before the fault.")
    raise RuntimeError("a fault of ours")


def sent(cluster_id: str, line: bytes) -> list[dict[str, Any]]:
    with _connected(cluster_id) as connection, connection.makefile("rwb") as lines:
        lines.write(line)
        lines.flush()
        return [json.loads(answer) for answer in lines]


@pytest.mark.parametrize("line", MALFORMED, ids=repr)
def test_a_malformed_line_is_answered(line: bytes) -> None:
    async def check() -> None:
        cluster_id = secrets.token_hex(4)
        async with await listen(cluster_id, no_change):
            answers = await asyncio.wait_for(asyncio.to_thread(sent, cluster_id, line), 10)
        assert [(answer["event"], answer["field"]) for answer in answers] == [("failed", "workers")]

    asyncio.run(check())


def test_what_was_asked_and_said_crosses_and_a_no_names_its_field() -> None:
    async def scale(wanted: Numbers, tell: Tell) -> None:
        tell(f"{wanted[Phase.DECODE]} wanted")
        if wanted[Phase.DECODE] > (3,):
            raise ConfigError("Too many.", field="decode.workers")

    async def check() -> None:
        cluster_id = secrets.token_hex(4)
        async with await listen(cluster_id, scale):
            assert await asyncio.to_thread(lambda: list(ask(cluster_id, {Phase.DECODE: (3,)}))) == ["(3,) wanted"]
            with pytest.raises(ConfigError, match="Too many") as no:
                await asyncio.to_thread(lambda: list(ask(cluster_id, {Phase.DECODE: (4,)})))
            assert no.value.field == "decode.workers"

    asyncio.run(check())


def test_whoever_asked_does_not_wait_for_ever_when_the_supervisor_is_at_fault() -> None:
    async def check() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        cluster_id = secrets.token_hex(4)
        async with await listen(cluster_id, broken):
            with pytest.raises(Unavailable, match="has ended"):
                await asyncio.wait_for(asyncio.to_thread(lambda: list(ask(cluster_id, {Phase.DECODE: (3,)}))), 10)

    asyncio.run(check())

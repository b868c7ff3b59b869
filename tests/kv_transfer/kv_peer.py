"""One end of the hinge as a process: `python kv_peer.py prefill|decode LEASE_S TRANSPORT DEVICE`. Commands are JSON lines on
stdin, what is told JSON lines on stdout. It ends at the end of stdin."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import torch
from diptych.core.request import new_incarnation
from diptych.core.transfer import Transport
from diptych.kv_transfer.pool import Pool
from diptych.rpc.server import serve
from kv_rig import DecodeEnd, LaneFace, PrefillEnd, layout_with


def say(**line: object) -> None:
    print(json.dumps(line), flush=True)


def aloud(end: PrefillEnd | DecodeEnd) -> None:
    """Whatever the diary is told is printed too."""
    write = end.diary.write

    def write_and_say(what: str, transfer_id: str) -> None:
        write(what, transfer_id)
        error = end.diary.errors.get(transfer_id)
        say(what=what, id=transfer_id, error=error.message if error else None)

    end.diary.write = write_and_say  # type: ignore[method-assign]


async def commands() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def prefill(pool: Pool, lease_s: float, transport: Transport) -> None:
    end = PrefillEnd(pool.layout, [pool], lease_s, None, incarnation=new_incarnation(), transports=(transport,))
    aloud(end)
    say(what="ready", address="")
    async for line in await commands():
        command: dict[str, Any] = json.loads(line)
        match command["do"]:
            case "offer":
                end.offer(command["id"], command["to"], command["tokens"])
            case "compute":
                end.compute(command["id"], tuple(command["layers"]), 0, command["stop"])
            case "finish":
                await end.compute_all(command["id"], 32)
    await end.source.close()


async def decode(pool: Pool, lease_s: float, transport: Transport) -> None:
    end = DecodeEnd(pool.layout, [pool], lease_s, incarnation=new_incarnation(), transports=(transport,))
    aloud(end)
    server = await serve("127.0.0.1:0", worker=LaneFace(end.destination.serve_lane))
    say(what="ready", address=server.address)
    async for line in await commands():
        end.destination.expect(json.loads(line)["id"])
    await end.destination.close()
    await server.stop(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    shared = Pool.allocate(layout_with(64), torch.device(sys.argv[4]))
    asyncio.run((prefill if sys.argv[1] == "prefill" else decode)(shared, float(sys.argv[2]), Transport(sys.argv[3])))
    shared.close()

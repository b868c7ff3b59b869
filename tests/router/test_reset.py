"""Connections that clients reset."""

import asyncio
import gc
import socket
import struct

from uvicorn.protocols.http.h11_impl import H11Protocol


def held():
    gc.collect()
    return sum(issubclass(type(thing), H11Protocol) for thing in gc.get_objects())


def test_nothing_is_kept_of_a_connection_that_was_reset(site):
    """Not even while its keep-alive timer, of 65 s, would have run."""

    async def scenario():
        async with site() as s:
            host, port = s.router.http.rsplit(":", 1)
            for _ in range(5):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                assert await reader.readuntil(b"ok") != b""
                # Closed without lingering, a socket says RST, not FIN.
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            await s.until(lambda: held() == 0, timeout_s=30.0)

    asyncio.run(scenario())

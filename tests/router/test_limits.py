"""What a client may hold: connections, headers, bodies and time, each bounded whatever the client does."""

import asyncio
import inspect
import resource
import socket
import sys
import time
from contextlib import ExitStack, suppress

import grpc
import httpx
import pytest
from certificates import Issued
from diptych.core.config import LimitsSection

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
BODY = {"prompt": "x" * 20, "max_tokens": 2}
MANY = 10_000


def port_of(address):
    return int(address.rsplit(":", 1)[1])


def is_open(connection):
    """Whether the server has not ended it."""
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


def dribble(port, start):
    """One byte every 50 ms, until the server has enough of it; how many it took."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(start)
        for count in range(400):
            try:
                connection.send(b"a")
            except (BrokenPipeError, ConnectionResetError):
                return count
            time.sleep(0.05)  # being slow is what is tested
    return None


@pytest.mark.parametrize("start", [b"", HEAD + b"x-long: ", HEAD + b"content-length: 100000\r\n\r\n{"])
def test_a_request_that_dribbles_in_is_cut_however_often_it_says_a_byte(site, start):
    async def check():
        async with site(prefill=0, decode=0, limits=LimitsSection(write_s=0.5)) as s:
            assert await asyncio.to_thread(dribble, port_of(s.router.http), start) is not None

    asyncio.run(check())


def poured(port, start, piece, times):
    """Bytes that the server took of so many pieces, and what it answered."""
    taken = 0
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(start)
        with suppress(BrokenPipeError, ConnectionResetError):  # it has had enough
            for _ in range(times):
                connection.sendall(piece)
                taken += len(piece)
        try:
            return taken, connection.recv(1000)
        except ConnectionResetError:
            return taken, b""


@pytest.mark.parametrize("announced", [True, False])
def test_of_a_body_of_100_mb_no_more_is_taken_than_the_limit(site, announced):
    length = b"content-length: 104857600" if announced else b"transfer-encoding: chunked"
    piece = b"x" * (1 << 20) if announced else b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"

    async def check():
        async with site(limits=LimitsSection(body_bytes=1 << 20)) as s:
            taken, answer = await asyncio.to_thread(poured, port_of(s.router.http), HEAD + length + b"\r\n\r\n", piece, 100)
            assert taken < 40 << 20, "the limit, what is dropped behind it, and what the system's buffers hold"
            assert answer[:12] in (b"HTTP/1.1 413", b"")
            async with httpx.AsyncClient(base_url=s.url) as c:
                assert (await c.post("/v1/completions", json=BODY)).status_code == 200

    asyncio.run(check())


def test_headers_without_end_are_refused(site):
    async def check():
        async with site(prefill=0, decode=0) as s:
            taken, answer = await asyncio.to_thread(poured, port_of(s.router.http), HEAD, b"x-more: " + b"y" * 1000 + b"\r\n", 100_000)
            assert taken < 24 << 20
            assert answer[:12] in (b"HTTP/1.1 400", b"")

    asyncio.run(check())


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_connections_are_counted_and_those_beyond_the_limit_hung_up_on(site, secure, tmp_path):
    """Under TLS those too whose handshake never comes; when they have gone, others may come."""
    files = Issued.below(tmp_path / "ca").public() if secure else None

    async def check():
        async with site(limits=LimitsSection(connections=20), tls=files) as s:
            with ExitStack() as stack:
                idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port_of(s.router.http)))) for _ in range(60)]
                await s.until(lambda: sum(map(is_open, idle)) == 20)
            url = f"{'https' if secure else 'http'}://localhost:{port_of(s.router.http)}"
            async with httpx.AsyncClient(base_url=url, verify=False) as c:
                assert (await c.post("/v1/completions", json=BODY)).status_code == 200

    asyncio.run(check())


IDLERS = f"""
import socket, sys
{inspect.getsource(is_open)}
idle = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=30) for _ in range(int(sys.argv[2]))]
print("ready", flush=True)
for line in sys.stdin:
    print(sum(map(is_open, idle)), flush=True)
"""
"""A process of their own: one may not open so many files that both ends had room in it."""


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("face", "most"), [("http", LimitsSection().connections), ("grpc", MANY)])
def test_ten_thousand_idle_connections_leave_room_for_work_and_are_ended(site, face, most):
    """HTTP keeps 4,096 of them for 30 s, gRPC each for 10 s, and requests go on meanwhile on connections there are."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1.5 * MANY:
        pytest.skip("a process may not open so many files")

    async def check():
        async with site() as s, httpx.AsyncClient(base_url=s.url) as c:
            assert (await c.post("/v1/completions", json=BODY)).status_code == 200
            command = [sys.executable, "-c", IDLERS, str(port_of(getattr(s.router, face))), str(MANY)]
            idlers = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
            try:
                assert await idlers.stdout.readline() == b"ready\n"
                await until_open(idlers, most)
                assert (await c.post("/v1/completions", json=BODY)).status_code == 200
                await until_open(idlers, 0)
            finally:
                idlers.kill()
                await idlers.wait()

    asyncio.run(check())


async def until_open(idlers, most):
    """Until no more than so many are open: the ends are in another process, of which nothing here tells."""
    async with asyncio.timeout(120):
        left = most + 1
        while left > most:
            idlers.stdin.write(b"\n")
            left = int(await idlers.stdout.readline())


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_grpc_connection_without_calls_is_ended_and_comes_back_by_itself(site):
    """grpc looks every 65 s whether there was a call since it last looked, so it may take twice as long."""

    async def check():
        async with site() as s, grpc.aio.insecure_channel(s.router.grpc) as channel:
            health = channel.unary_unary("/grpc.health.v1.Health/Check")
            await health(b"")
            async with asyncio.timeout(200):
                while (state := channel.get_state()) is grpc.ChannelConnectivity.READY:
                    await channel.wait_for_state_change(state)
            await health(b"")

    asyncio.run(check())

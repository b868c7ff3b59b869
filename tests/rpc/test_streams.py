"""Attach, Lane and Watch on real servers: order, both ways of closing, peers that vanish, peers that do not read."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import grpc
import pytest
from diptych.core.commands import NewTokens, StepEvents, Stop
from diptych.core.errors import Cancelled, DiptychError, InvalidRequest, Unavailable
from diptych.core.fleet import Fleet, WorkerState
from diptych.core.transfer import Cancel, KeepAlive, Offer
from diptych.rpc import channels
from diptych.rpc import stream as streams
from diptych.rpc.lane import METHOD as LANE
from diptych.rpc.lane import TOGETHER, Lane, dial_lane
from diptych.rpc.router import RouterClient
from diptych.rpc.worker import RouterStream, WorkerClient

NewWorker = Callable[[], Any]
SOON = 60.0


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, SOON)


def test_a_lane_carries_both_ways_in_order(serving: Any, echo_worker: NewWorker) -> None:
    async def scenario() -> None:
        async with serving(worker=echo_worker()) as server:
            lane = await dial_lane(server.address)
            sent = [Offer(f"t{index}", index) for index in range(1000)]
            for message in sent:
                lane.send(message)
            assert [await soon(anext(lane)) for _ in sent] == sent
            await lane.wait_closed()

    asyncio.run(scenario())


def test_attach_carries_commands_up_and_events_down(serving: Any, echo_worker: NewWorker) -> None:
    async def scenario() -> None:
        async with serving(worker=echo_worker()) as server, WorkerClient(server.address) as client:
            stream = client.attach()
            for name in "ab":
                stream.send(Stop(name))
            assert [await soon(anext(stream)) for _ in "ab"] == [StepEvents((NewTokens(name, ()),)) for name in "ab"]
            await stream.wait_closed()

    asyncio.run(scenario())


def test_closing_at_the_dialling_end_sends_what_is_queued_and_ends_the_other_end(serving: Any) -> None:
    class Listener:
        def __init__(self) -> None:
            self.heard: list[Any] = []
            self.ended = asyncio.Event()

        async def lane(self, lane: Lane) -> None:
            async for message in lane:
                self.heard.append(message)
            self.ended.set()

    async def scenario() -> None:
        face = Listener()
        async with serving(worker=face) as server:
            lane = await dial_lane(server.address)
            sent = [Cancel(str(index), "because") for index in range(100)]
            for message in sent:
                lane.send(message)
            lane.close()
            lane.send(Cancel("late", "dropped"))
            assert [message async for message in lane] == []
            await soon(face.ended.wait())
            assert face.heard == sent
            await soon(lane.wait_closed())

    asyncio.run(scenario())


def test_closing_at_the_serving_end_sends_what_is_queued_and_ends_the_other_end(serving: Any) -> None:
    class Refuser:
        async def lane(self, lane: Lane) -> None:
            lane.send(Cancel("t", "one"))
            lane.send(Cancel("t", "two"))
            lane.close()

    async def scenario() -> None:
        async with serving(worker=Refuser()) as server:
            lane = await dial_lane(server.address)
            lane.send(Offer("t", 1))
            assert [message.reason async for message in lane] == ["one", "two"]  # type: ignore[union-attr]
            assert lane.ended

    asyncio.run(scenario())


def test_each_message_is_taken_until_the_end_or_an_error(serving: Any) -> None:
    class Talker:
        def __init__(self, error: DiptychError | None) -> None:
            self.error = error

        async def lane(self, lane: Lane) -> None:
            for index in range(100):
                lane.send(Offer(str(index), index))
            if self.error is not None:
                raise self.error

    async def scenario() -> None:
        for error in (None, InvalidRequest("no more")):
            async with serving(worker=Talker(error)) as server:
                lane = await dial_lane(server.address)
                taken: list[Any] = []
                with nullcontext() if error is None else pytest.raises(InvalidRequest, match="no more"):
                    await soon(lane.each(taken.append))
                assert taken == [Offer(str(index), index) for index in range(100)]

    asyncio.run(scenario())


def test_who_takes_each_message_may_close_or_fail(serving: Any, echo_worker: NewWorker) -> None:
    async def scenario() -> None:
        async with serving(worker=echo_worker()) as server:
            for end in (None, KeyError("a defect")):
                lane = await dial_lane(server.address)
                for index in range(10):
                    lane.send(Offer(str(index), index))
                taken: list[Any] = []

                def take(message: Any, lane: Lane = lane, taken: list[Any] = taken, end: Exception | None = end) -> None:
                    taken.append(message)
                    if len(taken) == 5:
                        if end is not None:
                            raise end
                        lane.close()

                with pytest.raises(KeyError) if end is not None else nullcontext():
                    await soon(lane.each(take))
                assert len(taken) == 5
                await soon(lane.wait_closed())

    asyncio.run(scenario())


def test_what_was_sent_before_the_end_arrives_though_the_peer_is_writing(serving: Any) -> None:
    class Refuser:
        async def lane(self, lane: Lane) -> None:
            await anext(lane)
            for index in range(20):
                lane.send(Cancel(str(index), "no"))

    async def scenario() -> None:
        async with serving(worker=Refuser()) as server:
            for _ in range(10):
                lane = await dial_lane(server.address)
                for index in range(100):
                    lane.send(Cancel(str(index), "x" * 50_000))
                heard = []
                with suppress(Unavailable):  # the end may come while this side writes
                    async for message in lane:
                        heard.append(message.transfer_id)  # type: ignore[union-attr]
                assert heard == [str(index) for index in range(20)]

    asyncio.run(scenario())


def test_an_error_of_the_face_reaches_the_peer(serving: Any) -> None:
    class Refuser:
        async def attached(self, stream: RouterStream) -> None:
            raise Unavailable("It is draining.")

    async def scenario() -> None:
        async with serving(worker=Refuser()) as server, WorkerClient(server.address) as client:
            with pytest.raises(Unavailable, match=r"^It is draining\.$"):
                await soon(anext(client.attach()))

    asyncio.run(scenario())


def test_closing_the_client_ends_its_streams_at_both_ends(serving: Any, echo_worker: NewWorker) -> None:
    async def scenario() -> None:
        face = echo_worker()
        async with serving(worker=face) as server:
            client = WorkerClient(server.address)
            stream = client.attach()
            stream.send(Stop("a"))
            await soon(anext(stream))
            await client.close()
            assert await soon(face.ended.get()) is None
            assert [event async for event in stream] == []

    asyncio.run(scenario())


def test_what_is_no_message_ends_the_stream_and_names_the_field(serving: Any, echo_worker: NewWorker) -> None:
    async def scenario() -> None:
        face = echo_worker()
        async with serving(worker=face) as server, grpc.aio.insecure_channel(server.address) as channel:
            for path, junk, field in (("Attach", b"\xff\xff", "Command"), ("Lane", b"", "message")):
                call: Any = channel.stream_stream(f"/diptych.internal.v1.Worker/{path}", None, None)()  # type: ignore[call-arg]
                await call.write(junk)
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await soon(call.read())
                assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert dict(raised.value.trailing_metadata() or ())["diptych-field"] == field
                assert isinstance(await soon(face.ended.get()), InvalidRequest)
            async with WorkerClient(server.address) as client:
                assert await client.drain(0.5) == 5  # the worker lives

    asyncio.run(scenario())


def test_a_stopped_server_ends_every_stream_with_unavailable(serving: Any, echo_worker: NewWorker) -> None:
    async def scenario() -> None:
        face = echo_worker()
        async with serving(worker=face) as server:
            lane, client = await dial_lane(server.address), WorkerClient(server.address)
            stream, reports = client.attach(), client.watch()
            stream.send(Stop("a"))
            await soon(anext(stream))
            await soon(anext(reports))
            await server.stop(0.0)
            for ends in (anext(lane), anext(stream), _exhaust(reports)):
                with pytest.raises(Unavailable):
                    await soon(ends)
            for _ in range(3):
                await soon(face.ended.get())
            await client.close()

    asyncio.run(scenario())


async def _exhaust(reports: Any) -> None:
    async for _ in reports:
        pass


CHILD = """
import asyncio, sys
from diptych.core.errors import DiptychError
from diptych.core.transfer import Offer
from diptych.rpc.lane import dial_lane
from diptych.rpc.server import serve

class Echo:
    async def lane(self, lane):
        async for message in lane:
            lane.send(message)

async def main():
    if len(sys.argv) > 1:
        lane = await dial_lane(sys.argv[1])
        lane.send(Offer("t", 1))
    else:
        server = await serve("127.0.0.1:0", worker=Echo())
        print(server.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def _child(*args: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.Popen([sys.executable, "-c", CHILD, *args], stdout=subprocess.PIPE, text=True, env=environment)


def test_a_server_that_is_killed_ends_the_lane_at_once() -> None:
    async def scenario(address: str) -> None:
        lane = await dial_lane(address)
        lane.send(Offer("t", 1))
        await soon(anext(lane))
        child.send_signal(signal.SIGKILL)
        with pytest.raises(Unavailable):
            await soon(anext(lane))
        with pytest.raises(Unavailable):
            await dial_lane(address, timeout_s=1.0)

    with _child() as child:
        try:
            assert child.stdout is not None
            asyncio.run(scenario(child.stdout.readline().strip()))
        finally:
            child.kill()


def test_a_server_that_is_stopped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP: the kernel still acknowledges what is sent; only the unanswered probe tells."""
    monkeypatch.setattr(channels, "KEEPALIVE_MS", 500)
    monkeypatch.setattr(channels, "PING_TIMEOUT_MS", 1500)  # also for the child, which may be slow to answer at first

    async def scenario(address: str) -> None:
        lane = await dial_lane(address)
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(Unavailable):
            await soon(anext(lane))

    with _child() as child:
        try:
            assert child.stdout is not None
            asyncio.run(scenario(child.stdout.readline().strip()))
        finally:
            child.kill()


def test_what_grpc_raises_at_the_end_of_a_dead_call_is_translated(serving: Any, echo_worker: NewWorker) -> None:
    class Dead:
        async def done_writing(self) -> None:
            raise grpc.aio.BaseError("the batch could not be executed")

        def cancel(self) -> None: ...

    async def scenario() -> None:
        async with serving(worker=echo_worker()) as server:
            call = channels.ClientCall(channels.open_channel(server.address), LANE, peer="it", owns_channel=True)
            call.cancel()
            call._call = Dead()
            with pytest.raises(Unavailable, match="it: the stream has ended"):
                await call.done_writing()

    asyncio.run(scenario())


def test_a_connection_with_nothing_to_say_is_not_cut_for_its_probes() -> None:
    options = dict(channels.server_options(1))
    assert options["grpc.http2.min_ping_interval_without_data_ms"] < channels.KEEPALIVE_MS


def test_a_client_that_is_killed_ends_the_lane_at_the_server(serving: Any) -> None:
    class Listener:
        def __init__(self) -> None:
            self.heard, self.ended = asyncio.Event(), asyncio.Event()

        async def lane(self, lane: Lane) -> None:
            async for _ in lane:
                self.heard.set()
            self.ended.set()

    async def scenario() -> None:
        face = Listener()
        async with serving(worker=face) as server:
            with _child(server.address) as child:
                try:
                    await soon(face.heard.wait())
                    child.send_signal(signal.SIGKILL)
                    await soon(face.ended.wait())
                finally:
                    child.kill()

    asyncio.run(scenario())


def test_a_peer_that_does_not_read_is_cut_and_says_so_in_the_log(
    serving: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(streams, "QUEUED_MESSAGES", 50)
    big = StepEvents((NewTokens("a" * 1_000_000, ()),))

    class Talker:
        def __init__(self) -> None:
            self.ended: asyncio.Future[DiptychError] = asyncio.get_running_loop().create_future()

        async def attached(self, stream: RouterStream) -> None:
            while not stream.ended:
                stream.send(big)
                await asyncio.sleep(0)
            try:
                await anext(stream)
            except DiptychError as error:
                self.ended.set_result(error)
                raise

    async def scenario() -> None:
        face = Talker()
        async with serving(worker=face) as server, grpc.aio.insecure_channel(server.address) as channel:
            call: Any = channel.stream_stream("/diptych.internal.v1.Worker/Attach", None, None)()  # type: ignore[call-arg]
            error = await soon(face.ended)
            assert isinstance(error, Unavailable)
            assert "does not read" in error.message
            call.cancel()

    asyncio.run(scenario())
    assert "does not read" in caplog.text


def test_a_router_cuts_a_worker_that_does_not_read(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "QUEUED_BYTES", 1 << 20)

    class Deaf:
        def __init__(self) -> None:
            self.ended = asyncio.Event()

        async def attached(self, stream: RouterStream) -> None:
            async for _ in stream:
                await asyncio.get_running_loop().create_future()

    async def scenario() -> None:
        async with serving(worker=Deaf()) as server, WorkerClient(server.address) as client:
            stream = client.attach()
            stream.send(Stop("first"))
            for _ in range(100_000):
                if stream.ended:
                    break
                stream.send(Stop("a" * 10_000))
                await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="does not read"):
                await soon(anext(stream))

    asyncio.run(scenario())


def test_reading_ahead_is_bounded(serving: Any) -> None:
    """A consumer that stops taking messages stops the reading too, so that flow control reaches the sender."""
    held: list[int] = []

    class Slow:
        async def lane(self, lane: Lane) -> None:
            await anext(lane)
            for _ in range(2000):
                if len(lane._inbox) < streams.READ_AHEAD:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)  # time for more to come, if it could
            held.append(len(lane._inbox))
            lane.close()

    async def scenario() -> None:
        async with serving(worker=Slow()) as server:
            lane = await dial_lane(server.address)
            for index in range(3000):
                lane.send(KeepAlive((str(index),)))
            with suppress(Unavailable):  # the end may come while this side writes
                assert [message async for message in lane] == []

    asyncio.run(scenario())
    (most,) = held
    assert streams.READ_AHEAD <= most < streams.READ_AHEAD + TOGETHER


def test_nobody_there() -> None:
    async def scenario() -> None:
        with pytest.raises(Unavailable, match=r"worker at 127\.0\.0\.1:1"):
            await dial_lane("127.0.0.1:1", timeout_s=2.0)
        async with WorkerClient("127.0.0.1:1") as client:
            for call in (anext(client.attach()), client.drain(0.1), anext(client.watch())):
                with pytest.raises(Unavailable):
                    await soon(call)

    asyncio.run(scenario())


def test_a_listener_that_never_answers_is_given_up(unused_listener: str) -> None:
    async def scenario() -> None:
        with pytest.raises(Unavailable, match="did not accept"):
            await dial_lane(unused_listener, timeout_s=0.3)

    asyncio.run(scenario())


def test_a_worker_that_comes_back_is_found_again(serving: Any, echo_worker: NewWorker) -> None:
    async def scenario() -> None:
        async with serving(worker=echo_worker()) as server:
            client = WorkerClient(server.address)
            assert await client.drain(0.1) == 1
        with pytest.raises(Unavailable):
            await client.drain(0.1)
        async with serving(server.address, worker=echo_worker()), asyncio.timeout(SOON):
            while True:
                try:
                    assert await client.drain(0.1) == 1
                    break
                except Unavailable:
                    await asyncio.sleep(0.05)
        await client.close()

    asyncio.run(scenario())


def test_a_closed_client_says_so(serving: Any, echo_worker: NewWorker) -> None:
    async def scenario() -> None:
        async with serving(worker=echo_worker()) as server:
            client = WorkerClient(server.address)
            await client.close()
            for call in (client.drain(0.1), anext(client.watch())):
                with pytest.raises(Cancelled, match="closed"):
                    await soon(call)
            with pytest.raises(Cancelled, match="closed"):
                client.attach()

    asyncio.run(scenario())


def test_watching_ends_the_generator_when_the_watcher_leaves(serving: Any, echo_worker: NewWorker) -> None:
    async def scenario() -> None:
        face = echo_worker()
        async with serving(worker=face) as server, WorkerClient(server.address) as client:
            reports = client.watch()
            seen = [await soon(anext(reports)) for _ in range(3)]
            assert [report.waiting for report in seen] == [0, 1, 2]
            await reports.aclose()
            await soon(face.ended.get())
            assert face.watchers == 0

    asyncio.run(scenario())


def test_the_router_is_told_and_tells(serving: Any, fixed_router: Any) -> None:
    async def scenario() -> None:
        async with serving(router=fixed_router) as server, RouterClient(server.address) as client:
            assert await client.publish(Fleet(3)) == 3
            assert await client.publish(Fleet(2)) == 3
            fleet, (report,) = await client.describe()
            assert fleet == Fleet(3)
            assert (report.state, report.counters) == (WorkerState.DRAINING, (("n", 1.5),))

    asyncio.run(scenario())

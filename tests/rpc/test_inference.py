"""The public service: streaming, cancelling in both directions, one terminal per call, bad input, a client that never reads."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from contextlib import aclosing, closing
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from diptych.core.errors import Cancelled, DeadlineExceeded, DiptychError, Internal, InvalidRequest, Unavailable
from diptych.core.generate import Chunk, Generate, Model
from diptych.core.request import FinishReason
from diptych.core.sampling import SamplingParams
from diptych.proto import inference_pb2 as pb
from diptych.rpc.handlers import inference_handlers
from diptych.rpc.inference import InferenceClient, SyncInferenceClient

NewParrot = Callable[[], Any]
GENERATE = "/diptych.v1.Inference/Generate"


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, 60.0)


def test_an_answer_streams_and_ends_with_its_finish(serving: Any, parrot: NewParrot) -> None:
    async def scenario() -> None:
        face = parrot()
        async with serving(inference=face) as server, InferenceClient(server.address) as client:
            call = Generate("to be or", sampling=SamplingParams(seed=2**63, max_tokens=5), stop=("!",), request_id="mine")
            chunks = [chunk async for chunk in client.generate(call)]
            assert face.calls == [call]
            assert [chunk.text for chunk in chunks] == ["to", "be", "or", ""]
            assert [token.id for chunk in chunks for token in chunk.tokens] == [10, 11, 12]
            finishes = [chunk.finish for chunk in chunks]
            assert finishes[:-1] == [None] * 3
            assert finishes[-1] is not None
            assert [chunk.reason for chunk in chunks] == [None] * 3 + [FinishReason.STOP]
            assert finishes[-1].timing.transport == "shm"
            assert await client.models() == (Model("parrot", 4096, 1000, False),)

    asyncio.run(scenario())


def test_chunks_come_when_they_are_said_not_at_the_end(serving: Any, parrot: NewParrot) -> None:
    async def scenario() -> None:
        face = parrot()
        face.hold_after = 1
        async with serving(inference=face) as server, InferenceClient(server.address) as client:
            chunks = client.generate(Generate("a b"))
            assert (await soon(anext(chunks))).text == "a"
            await chunks.aclose()

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["aclose", "task", "client"])
def test_leaving_cancels_at_the_server(how: str, serving: Any, parrot: NewParrot) -> None:
    async def scenario() -> None:
        face = parrot()
        face.hold_after = 1
        async with serving(inference=face) as server, InferenceClient(server.address) as client:
            chunks = client.generate(Generate("a b c d"))
            await soon(anext(chunks))
            if how == "aclose":
                await chunks.aclose()
            elif how == "task":
                task = asyncio.create_task(_drain(chunks))
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                waiting = asyncio.create_task(_drain(chunks))
                await asyncio.sleep(0.05)
                await client.close()
                with pytest.raises(Cancelled):
                    await soon(waiting)
            assert await soon(face.closed.get()) == 1

    asyncio.run(scenario())


async def _drain(chunks: Any) -> list[Chunk]:
    return [chunk async for chunk in chunks]


def test_a_time_limit_ends_both_ends(serving: Any, parrot: NewParrot) -> None:
    async def scenario() -> None:
        face = parrot()
        face.hold_after = 0
        async with serving(inference=face) as server, InferenceClient(server.address) as client:
            within_s = 0.2
            while not face.calls:  # a call may end before it has come to the server
                with pytest.raises(DeadlineExceeded):
                    await soon(_drain(client.generate(Generate("a"), timeout_s=within_s)))
                within_s *= 2
            assert await soon(face.closed.get()) == 0

    asyncio.run(scenario())


def test_a_server_that_stops_ends_the_answer(serving: Any, parrot: NewParrot) -> None:
    async def scenario() -> None:
        face = parrot()
        async with serving(inference=face) as server, InferenceClient(server.address) as client:
            face.hold_after = 1
            chunks = client.generate(Generate("a b"))
            await soon(anext(chunks))
            ending = asyncio.create_task(_drain(chunks))
            await server.stop(0.0)
            with pytest.raises(Unavailable):
                await soon(ending)
            assert await soon(face.closed.get()) == 1

    asyncio.run(scenario())


def test_an_answer_without_a_finish_is_an_error_never_an_empty_success(serving: Any, parrot: NewParrot) -> None:
    async def scenario() -> None:
        face = parrot()
        face.silent_end = True
        async with serving(inference=face) as server, InferenceClient(server.address) as client:
            with pytest.raises(Internal):
                await soon(_drain(client.generate(Generate("a b"))))

    asyncio.run(scenario())


def test_nothing_follows_the_finish(serving: Any, parrot: NewParrot) -> None:
    async def scenario() -> None:
        face = parrot()
        original, ended = face.generate, asyncio.Event()

        async def chatty(call: Generate) -> Any:
            try:
                async for chunk in original(call):
                    yield chunk
                yield Chunk("r1", text="one more thing")
            finally:
                ended.set()

        face.generate = chatty
        async with serving(inference=face) as server, grpc.aio.insecure_channel(server.address) as channel:
            call: Any = channel.unary_stream(GENERATE, None, pb.GenerateResponse.FromString)
            texts = [answer.text async for answer in call(pb.GenerateRequest(text="a b").SerializeToString())]
            assert texts == ["a", "b", ""]
            await soon(ended.wait())

    asyncio.run(scenario())


async def _to_the_end(server: Any) -> int:
    async with InferenceClient(server.address) as client:
        return len(await soon(_drain(client.generate(Generate("a b")))))


async def _to_the_finish(server: Any) -> int:
    """Leaves the generator with the chunk that has the finish."""
    count = 0
    async with InferenceClient(server.address) as client, aclosing(client.generate(Generate("a b"))) as chunks:
        async for chunk in chunks:
            count += 1
            if chunk.finish:
                break
    return count


async def _blocking(server: Any) -> int:
    def ask() -> int:
        with SyncInferenceClient(server.address) as client, closing(client.generate(Generate("a b"))) as chunks:
            return next(count for count, chunk in enumerate(chunks, 1) if chunk.finish)

    return await asyncio.to_thread(ask)


@pytest.mark.parametrize("ask", [_to_the_end, _to_the_finish, _blocking])
def test_a_call_that_ends_well_is_not_cancelled_before_its_status(ask: Any, serving: Any, parrot: NewParrot) -> None:
    """A cancelled call's status cannot be sent, and each that cannot costs the server 80 bytes for ever (grpc issue 43360)."""

    async def scenario() -> None:
        face = parrot()
        original, ended = face.generate, asyncio.Queue[str]()

        async def slow_to_end(call: Generate) -> Any:
            try:
                async for chunk in original(call):
                    yield chunk
            finally:
                try:
                    await asyncio.sleep(0.2)
                except asyncio.CancelledError:
                    ended.put_nowait("cancelled")
                    raise
                ended.put_nowait("whole")

        face.generate = slow_to_end
        async with serving(inference=face) as server:
            assert await ask(server) == 3
            assert await soon(ended.get()) == "whole"

    asyncio.run(scenario())


def test_a_write_under_way_is_not_cancelled_with_its_call(parrot: NewParrot) -> None:
    """grpc.aio frees what is written only for who awaits the write to its end."""

    class Context:
        def __init__(self) -> None:
            self.writing, self.taken, self.written = asyncio.Event(), asyncio.Event(), asyncio.Event()

        def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
            return ()

        async def send_initial_metadata(self, metadata: object) -> None:
            return None

        async def write(self, message: bytes) -> None:
            self.writing.set()
            await self.taken.wait()
            self.written.set()
            raise RuntimeError("the client has left")

    async def scenario() -> None:
        details = SimpleNamespace(method=GENERATE, invocation_metadata=())
        handler: Any = inference_handlers(parrot(), set(), 10.0).service(details)  # type: ignore[arg-type]
        context, complaints = Context(), []
        asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
        request = pb.GenerateRequest(text="a b").SerializeToString()
        call = asyncio.create_task(handler.unary_stream(request, context))
        await soon(context.writing.wait())
        call.cancel()
        await asyncio.wait({call}, timeout=10.0)
        assert call.cancelled()
        context.taken.set()
        await soon(context.written.wait())
        del call
        await asyncio.sleep(0.01)
        gc.collect()
        assert not complaints

    asyncio.run(scenario())


BAD = {
    "empty": (b"", "prompt"),
    "no prompt": (pb.GenerateRequest(model="m").SerializeToString(), "prompt"),
    "no text": (pb.GenerateRequest(text="").SerializeToString(), "prompt"),
    "not UTF-8": (b"\x12\x03\xed\xa0\x80", "GenerateRequest"),
    "not protobuf": (b"\xff" * 40, "GenerateRequest"),
    "NaN": (pb.GenerateRequest(text="x", sampling=pb.Sampling(temperature=float("nan"))).SerializeToString(), "temperature"),
    "cold": (pb.GenerateRequest(text="x", sampling=pb.Sampling(temperature=-1)).SerializeToString(), "temperature"),
    "nothing wanted": (pb.GenerateRequest(text="x", sampling=pb.Sampling(max_tokens=0)).SerializeToString(), "max_tokens"),
    "too many logprobs": (pb.GenerateRequest(text="x", sampling=pb.Sampling(logprobs=99)).SerializeToString(), "logprobs"),
    "stop token": (pb.GenerateRequest(text="x", sampling=pb.Sampling(stop_token_ids=[10**9])).SerializeToString(), "stop_token_ids"),
    "many stops": (pb.GenerateRequest(text="x", stop=["s"] * 17).SerializeToString(), "stop"),
}


def test_bad_input_is_answered_with_its_field_and_harms_nobody(serving: Any, parrot: NewParrot) -> None:
    async def scenario() -> None:
        async with serving(inference=parrot()) as server, grpc.aio.insecure_channel(server.address) as channel:
            for request, field in BAD.values():
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await soon(channel.unary_stream(GENERATE, None, None)(request).read())
                assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert dict(raised.value.trailing_metadata() or ())["diptych-field"] == field
            async with InferenceClient(server.address) as client:
                assert len(await soon(_drain(client.generate(Generate((1, 2)))))) == 3

    asyncio.run(scenario())


def test_bad_input_of_our_own_client_is_the_same_error(serving: Any, parrot: NewParrot) -> None:
    async def scenario() -> None:
        async with serving(inference=parrot()) as server, InferenceClient(server.address) as client:
            for call, field in ((Generate("x", sampling=SamplingParams(top_p=0.0)), "top_p"), (Generate("\ud800"), "prompt")):
                with pytest.raises(InvalidRequest) as raised:
                    await soon(_drain(client.generate(call)))
                assert raised.value.field == field

    asyncio.run(scenario())


def test_a_message_over_the_limit_is_refused_and_the_server_lives(serving: Any, parrot: NewParrot) -> None:
    async def scenario() -> None:
        async with serving(inference=parrot(), max_message_bytes=10_000) as server, InferenceClient(server.address) as client:
            with pytest.raises(DiptychError) as raised:
                await soon(_drain(client.generate(Generate("x" * 20_000))))
            assert (raised.value.code, raised.value.http_status) == ("too_large", 413)
            assert len(await soon(_drain(client.generate(Generate("x" * 9_000))))) == 2

    asyncio.run(scenario())


def test_a_client_that_never_reads_is_cut(serving: Any) -> None:
    class Endless:
        def __init__(self) -> None:
            self.closed = asyncio.Event()

        async def generate(self, call: Generate) -> Any:
            try:
                while True:
                    yield Chunk("r", text="x" * 50_000)
            finally:
                self.closed.set()

    async def scenario() -> None:
        face = Endless()
        async with serving(inference=face, write_timeout_s=0.2) as server, grpc.aio.insecure_channel(server.address) as channel:
            call = channel.unary_stream(GENERATE, None, None)(pb.GenerateRequest(text="x").SerializeToString())
            await soon(face.closed.wait())

            async def read_on() -> None:
                while await call.read():
                    pass

            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await soon(read_on())
            assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    asyncio.run(scenario())

"""The port: what cannot be had is refused with what to do; what is no gRPC does no harm; health and reflection answer."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from diptych.core.errors import ConfigError
from diptych.core.generate import Generate
from diptych.proto import inference_pb2, worker_pb2
from diptych.rpc.inference import InferenceClient, SyncInferenceClient
from diptych.rpc.server import serve
from diptych.rpc.worker import WorkerClient
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, 60.0)


def refusal(address: str) -> ConfigError:
    async def scenario() -> None:
        await serve(address)

    with pytest.raises(ConfigError) as raised:
        asyncio.run(scenario())
    return raised.value


def test_a_port_in_use_is_refused_with_what_to_do(serving: Any, echo_worker: Callable[[], Any]) -> None:
    async def scenario() -> None:
        async with serving(worker=echo_worker()) as server:
            for host in ("127.0.0.1", "localhost"):
                with pytest.raises(ConfigError) as raised:
                    await serve(f"{host}:{server.port}", worker=echo_worker())
                assert raised.value.field == "address"
                for word in (str(server.port), "already in use", "choose another"):
                    assert word in raised.value.message
        async with serving(server.address, worker=echo_worker()) as again:
            assert again.port == server.port

    asyncio.run(scenario())


def test_a_port_that_something_else_uses_is_refused(unused_listener: str, caplog: pytest.LogCaptureFixture) -> None:
    """And no server is left behind that was never started: grpc complains when it is collected."""
    with caplog.at_level(logging.DEBUG):
        assert "already in use" in refusal(unused_listener).message
        gc.collect()
    assert "running server" not in caplog.text


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", ":5000", "127.0.0.1:http", "127.0.0.1:70000", "127.0.0.1:-1", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    assert refusal(address).field == "address"
    with pytest.raises(ConfigError):
        SyncInferenceClient(address)


def test_unknown_and_foreign_hosts_are_refused() -> None:
    assert "unknown" in refusal("no-such-host.invalid:0").message
    assert "Cannot listen" in refusal("192.0.2.1:5000").message


def test_a_name_binds_one_address(serving: Any, parrot: Callable[[], Any]) -> None:
    async def scenario() -> None:
        async with serving("localhost:0", inference=parrot()) as server:
            assert server.address == f"127.0.0.1:{server.port}"

    asyncio.run(scenario())


def test_ipv6(serving: Any, parrot: Callable[[], Any]) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this host has no IPv6")

    async def scenario() -> None:
        async with serving("[::1]:0", inference=parrot()) as server, InferenceClient(server.address) as client:
            assert len(await soon(client.models())) == 1

    asyncio.run(scenario())


GARBAGE = {
    "noise": bytes(range(256)) * 40,
    "HTTP/1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "half a request": b"POST /v1/completions HTTP/1.1\r\nContent-Le",
    "half a preface": b"PRI * HTTP/2.0\r\n\r\nS",
    "preface, then noise": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 2000,
    "a frame of 16 MB announced": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "nothing": b"",
}


def test_garbage_on_the_port_harms_nobody(serving: Any, echo_worker: Callable[[], Any], parrot: Callable[[], Any]) -> None:
    async def scenario() -> None:
        async with serving(worker=echo_worker(), inference=parrot()) as server, WorkerClient(server.address) as client:
            writers = []
            for junk in GARBAGE.values():
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(junk)
                writers.append(writer)
                assert await soon(client.drain(0.5)) == 5
            for writer in writers:
                writer.close()
            async with InferenceClient(server.address) as other:
                assert len(await soon(other.models())) == 1

    asyncio.run(scenario())


def test_every_method_of_every_service_is_served(
    serving: Any, echo_worker: Callable[[], Any], parrot: Callable[[], Any], fixed_router: Any
) -> None:
    async def scenario() -> None:
        faces = {"worker": echo_worker(), "inference": parrot(), "router": fixed_router}
        async with serving(**faces) as server, grpc.aio.insecure_channel(server.address) as channel:
            services = [*worker_pb2.DESCRIPTOR.services_by_name.values(), *inference_pb2.DESCRIPTOR.services_by_name.values()]
            for method in (method for service in services for method in service.methods):
                call: Any = channel.stream_stream(f"/{method.containing_service.full_name}/{method.name}", None, None)()  # type: ignore[call-arg]
                await call.write(b"\xff")
                await call.done_writing()
                assert await soon(call.code()) is grpc.StatusCode.INVALID_ARGUMENT, method.full_name

    asyncio.run(scenario())


def test_when_stop_returns_every_face_has_cleaned_up(serving: Any, parrot: Callable[[], Any]) -> None:
    async def scenario() -> None:
        face = parrot()
        face.hold_after = 1
        async with serving(inference=face) as server, InferenceClient(server.address) as client:
            chunks = [client.generate(Generate("a b")) for _ in range(20)]
            for each in chunks:
                await soon(anext(each))
            await server.stop(0.05)
            assert face.closed.qsize() == 20

    asyncio.run(scenario())


def test_a_service_that_has_no_face_is_not_served(serving: Any, parrot: Callable[[], Any]) -> None:
    async def scenario() -> None:
        async with serving(inference=parrot()) as server, WorkerClient(server.address) as client:
            with pytest.raises(ConfigError, match="worker at"):
                await soon(client.drain(0.1))

    asyncio.run(scenario())


def test_a_proxy_in_the_environment_is_not_used(
    serving: Any, parrot: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, unused_listener: str
) -> None:
    for name in ("http_proxy", "grpc_proxy", "https_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://{unused_listener}")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)

    async def scenario() -> None:
        async with serving(inference=parrot()) as server, InferenceClient(server.address) as client:
            assert len(await soon(client.models())) == 1

    asyncio.run(scenario())


def test_health_says_what_it_was_told(serving: Any, parrot: Callable[[], Any]) -> None:
    status = health_pb2.HealthCheckResponse

    async def scenario() -> None:
        async with serving(inference=parrot()) as server, grpc.aio.insecure_channel(server.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
            for serving_now, expected in ((None, status.NOT_SERVING), (True, status.SERVING), (False, status.NOT_SERVING)):
                if serving_now is not None:
                    await server.set_serving(serving_now)
                for service in ("", "diptych.v1.Inference"):
                    answer = await soon(stub.Check(health_pb2.HealthCheckRequest(service=service)))
                    assert answer.status == expected

    asyncio.run(scenario())


def test_reflection_describes_the_public_services_only(serving: Any, parrot: Callable[[], Any], fixed_router: Any) -> None:
    async def scenario() -> None:
        async with serving(inference=parrot(), router=fixed_router) as server:
            await asyncio.to_thread(look, server.address)

    def look(address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert set(database.get_services()) == {
                "diptych.v1.Inference",
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }
            file = database.FindFileContainingSymbol("diptych.v1.Inference")
            assert {message.name for message in file.message_type} >= {"GenerateRequest", "GenerateResponse"}

    asyncio.run(scenario())


def test_a_worker_needs_neither_health_nor_reflection() -> None:
    """Worker processes start on machines that have grpcio and protobuf alone."""
    look = (
        "import sys, diptych.rpc.server, diptych.rpc.worker, diptych.rpc.lane;"
        "print({'grpc_health.v1', 'grpc_reflection.v1alpha'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"

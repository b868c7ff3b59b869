"""gRPC under TLS: who is of the cluster gets in, nobody else does, and certificates change while calls run."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from certificates import Issued, strangers
from diptych.core.access import Access
from diptych.core.errors import ConfigError, DiptychError, Unauthenticated, Unavailable
from diptych.core.fleet import Fleet
from diptych.core.generate import Generate
from diptych.core.security import TlsFiles
from diptych.core.transfer import KeepAlive
from diptych.rpc.inference import InferenceClient, SyncInferenceClient
from diptych.rpc.lane import dial_lane
from diptych.rpc.router import RouterClient
from diptych.rpc.stranger import answers_strangers
from diptych.rpc.worker import WorkerClient

IN_S = 30.0


@pytest.fixture
def issued(tmp_path: Path) -> Issued:
    return Issued.below(tmp_path / "ca")


async def drained(address: str, tls: TlsFiles | None) -> int:
    async with WorkerClient(address, tls) as client:
        return await client.drain(2.0)


def test_processes_of_a_cluster_come_in_by_every_way(
    issued: Issued, serving: Any, echo_worker: Callable[[], Any], fixed_router: Any
) -> None:
    async def check() -> None:
        server_files, client_files = issued.internal(), issued.internal("client")
        async with serving(worker=echo_worker(), router=fixed_router, tls=server_files) as server:
            assert await drained(server.address, client_files) == 20
            async with RouterClient(server.address, client_files) as router:
                assert await router.publish(Fleet(3)) == 3
            lane = await dial_lane(server.address, tls=client_files)
            lane.send(KeepAlive(("t",)))
            assert await anext(lane) == KeepAlive(("t",))
            await lane.wait_closed()

    asyncio.run(check())


def test_nobody_else_comes_in(issued: Issued, tmp_path: Path, serving: Any, echo_worker: Callable[[], Any]) -> None:
    async def check() -> None:
        async with serving(worker=echo_worker(), tls=issued.internal()) as server:
            for fault, files in {"who shows nothing": None, **strangers(tmp_path, issued)}.items():
                with pytest.raises(Unavailable):
                    await drained(server.address, files)
                with pytest.raises(Unavailable):
                    await dial_lane(server.address, tls=files, timeout_s=IN_S)
                assert fault

    asyncio.run(check())


def test_a_worker_that_is_none_is_not_spoken_to(issued: Issued, tmp_path: Path, serving: Any, echo_worker: Callable[[], Any]) -> None:
    """Of another authority, expired, of ours but for another name, or plain: the router and the source would give it prompts and KV."""
    ours = issued.internal("ours")
    impostors = {
        "plain": None,
        "another name": TlsFiles(*issued.internal("named", name="elsewhere").all[:2]),
        **strangers(tmp_path, issued),
    }

    async def check() -> None:
        for fault, files in impostors.items():
            shown = None if files is None else TlsFiles(files.cert, files.key)
            async with serving(worker=echo_worker(), tls=shown) as server:
                with pytest.raises(Unavailable):
                    await drained(server.address, ours)
                assert fault

    asyncio.run(check())


def test_certificates_change_under_load_and_no_call_notices(issued: Issued, serving: Any, echo_worker: Callable[[], Any]) -> None:
    """Both ends take their new ones; in the end only who has them gets in, since the old authority is gone."""
    files = issued.internal()
    following = Issued.below(issued.directory / "next")

    async def calls(address: str, stop: asyncio.Event) -> int:
        count = 0
        while not stop.is_set():
            count += await drained(address, files) == 20
        return count

    async def check() -> None:
        async with serving(worker=echo_worker(), tls=files) as server:
            stop = asyncio.Event()
            running = [asyncio.create_task(calls(server.address, stop)) for _ in range(3)]
            for number in range(4):
                renewed = issued.internal(f"r{number}")
                # Certificate and key together, as a mounted secret is replaced: half of a new pair would be refused by both ends.
                for path, by in ((files.key, renewed.key), (files.cert, renewed.cert)):
                    shutil.copy(by, path.with_suffix(".draft"))
                    path.with_suffix(".draft").replace(path)
                await drained(server.address, renewed)
            stop.set()
            assert min(await asyncio.gather(*running)) > 0

            old, new = issued.internal("old"), following.internal()
            for path, by in ((files.ca, following.ca), (files.key, new.key), (files.cert, new.cert)):
                shutil.copy(by, path.with_suffix(".draft"))
                path.with_suffix(".draft").replace(path)
            assert await drained(server.address, new) == 20
            with pytest.raises(Unavailable):
                await drained(server.address, old)

    asyncio.run(check())


def test_the_public_face_takes_whoever_knows_its_authority_and_has_a_key(issued: Issued, serving: Any, parrot: Callable[[], Any]) -> None:
    def tenant_of(authorization: str | None) -> str:
        if authorization != "Bearer good":
            raise Unauthenticated("no")
        return "acme"

    async def answers(address: str, access: Access) -> int:
        async with InferenceClient(address, access) as client:
            return len([chunk async for chunk in client.generate(Generate("a b c"), timeout_s=IN_S)])

    def blocking(address: str, access: Access) -> int:
        with SyncInferenceClient(address, access) as client:
            return len(client.models()) + len(list(client.generate(Generate("a b c"), timeout_s=IN_S)))

    async def check() -> None:
        face = parrot()
        ca = str(issued.ca)
        async with serving(inference=face, tls=issued.public(), tenant_of=tenant_of, streams=8) as server:
            assert await answers(server.address, Access("good", ca=ca)) == 4
            assert await asyncio.to_thread(blocking, server.address, Access("good", ca=ca)) == 5
            assert {call.tenant for call in face.calls} == {"acme"}
            asked = len(face.calls)
            for access in (Access(ca=ca), Access("bad", ca=ca)):
                with pytest.raises(Unauthenticated):
                    await answers(server.address, access)
                with pytest.raises(Unauthenticated):
                    await asyncio.to_thread(blocking, server.address, access)
            for access in (Access("good"), Access("good", tls=True)):
                with pytest.raises(DiptychError):
                    await answers(server.address, access)
            assert len(face.calls) == asked
            assert [error.code for error in face.refusals] == ["invalid_api_key"] * 4

    asyncio.run(check())


def test_what_a_stranger_gets_is_seen(issued: Issued, serving: Any, parrot: Callable[[], Any], unused_listener: str) -> None:
    def refuse(authorization: str | None) -> str:
        raise Unauthenticated("no")

    async def answers(address: str, method: str = "ListModels", within_s: float = IN_S) -> bool:
        return await asyncio.to_thread(answers_strangers, address, f"/diptych.v1.Inference/{method}", timeout_s=within_s)

    async def check() -> None:
        async with serving(inference=parrot()) as server:
            assert await answers(server.address)
            assert await answers(server.address, "Nothing"), "a refusal of what was asked is an answer"
        assert not await answers(server.address), "nobody is there"
        for locked in ({"tenant_of": refuse}, {"tls": issued.public()}, {"tls": issued.internal()}):
            async with serving(inference=parrot(), **locked) as server:
                assert not await answers(server.address)
        assert not await answers(unused_listener, within_s=0.2)

    asyncio.run(check())


def test_an_authority_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.pem"):
        SyncInferenceClient("127.0.0.1:1", Access(ca=str(tmp_path / "nothing.pem")))

"""A leader and two followers in one process, over real connections: everything that is said between them, until all have ended."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.sampling import SamplingParams
from diptych.core.transfer import ShmEndpoint
from diptych.engine.batch import Batch, Draw, Drawn, Row, StepOutput
from diptych.engine.last_drawn import LastDrawn
from diptych.kv_transfer.actions import Fence
from diptych.kv_transfer.answers import Fenced
from diptych.worker.follower import Follower
from diptych.worker.leader import Leader

WAIT_S = 60.0
LAYOUT = Layout("model", (CacheGroup(CacheKind.FULL, (0, 1, 2), 1, 8, DType.FLOAT32),), 16, (8,), stages=(1, 1, 1))


@dataclass
class Engine:
    """One layer of three; the last draws 7."""

    rank: int
    last_drawn: LastDrawn = field(default_factory=lambda: LastDrawn(1))

    def run(self, batch: Batch, on_layer=None) -> StepOutput:
        if on_layer is not None:
            on_layer(self.rank)
        return StepOutput(batch.step, tuple(tuple(Drawn(7) for _ in row.draws) if self.rank == 2 else () for row in batch.rows))


class Transfers:
    """A rank that answers every fence, and closes in its own time."""

    def __init__(self, rank: int, answer: Any) -> None:
        self.rank, self.answer, self.endpoint, self.closed = rank, answer, ShmEndpoint(f"socket {rank}", bytes([rank])), False

    def carry_out(self, order: Any) -> None:
        assert isinstance(order, Fence)
        self.answer(Fenced(order.transfer_id, self.rank))

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.closed = True


class World:
    def __init__(self) -> None:
        self.deaths: SimpleQueue[BaseException] = SimpleQueue()
        self.transfers: dict[int, Transfers] = {}
        pairs = {rank: socket_pair() for rank in (1, 2)}
        self.followers = {rank: Follower(there, self.deaths.put) for rank, (_, there) in pairs.items()}
        self.leader = Leader({rank: here for rank, (here, _) in pairs.items()}, LAYOUT, self.deaths.put)

    async def follow(self, rank: int) -> None:
        def make(answer: Any) -> Transfers:
            self.transfers[rank] = Transfers(rank, answer)
            return self.transfers[rank]

        await self.followers[rank].serve(Engine(rank), make, draws=rank == 2)
        self.followers[rank].close()


def socket_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
    return here, there


def test_a_worker_of_three_from_its_start_to_its_end() -> None:
    async def main() -> None:
        world, loop = World(), asyncio.get_running_loop()
        leader, stores = world.leader, [world.leader.store, *(follower.store for follower in world.followers.values())]
        for number, store in enumerate(stores):
            await asyncio.to_thread(store.set, f"key {number}", bytes([number]))
        for store in stores:
            found = [await asyncio.to_thread(store.get, f"key {number}") for number in range(3)]
            assert found == [b"\0", b"\1", b"\2"], "what one sets all have"

        serving = [asyncio.create_task(world.follow(rank)) for rank in (2, 1)]
        await asyncio.to_thread(leader.wait_ready)
        answers: asyncio.Queue[Any] = asyncio.Queue()
        ranks = leader.others(answers.put_nowait, loop.call_soon_threadsafe)
        assert [rank.endpoint.socket for rank in ranks] == ["socket 1", "socket 2"]
        for rank in ranks:
            rank.carry_out(Fence("t", slot=3, word=4))
        async with asyncio.timeout(WAIT_S):
            assert {await answers.get(), await answers.get()} == {Fenced("t", 1), Fenced("t", 2)}

        run, events = leader.steps(Engine(0)), SimpleQueue[Any]()
        batch = Batch(0, (Row(0, 0, (5, 6), ((0,),), (Draw(SamplingParams(temperature=0.0), 0),)),))
        await asyncio.to_thread(run, batch, lambda layer, rank=0: events.put((rank, layer)), events.put)
        said = [await asyncio.to_thread(events.get, timeout=WAIT_S) for _ in range(4)]
        assert sorted(said[:3]) == [(0, 0), (1, 1), (2, 2)]
        assert said[3] == StepOutput(0, ((Drawn(7),),))

        async with asyncio.timeout(WAIT_S):
            for rank in ranks:
                await rank.close()
            assert all(transfers.closed for transfers in world.transfers.values())
            await asyncio.to_thread(leader.end)
            await asyncio.gather(*serving)
        assert world.deaths.empty()

    asyncio.run(main())


def test_whoever_loses_the_other_is_lost() -> None:
    async def main() -> None:
        world = World()
        world.followers[1]._channel._connection.shutdown(socket.SHUT_RDWR)
        lost = sorted([str(await asyncio.to_thread(world.deaths.get, timeout=WAIT_S)) for _ in range(2)])
        assert [words.partition(" of this worker")[0] for words in lost] == ["Lost rank 0", "Lost rank 1"]

    asyncio.run(main())


def test_a_follower_whose_engine_fails_is_lost() -> None:
    async def main() -> None:
        world = World()
        engine = Engine(1)
        engine.run = slip  # type: ignore[method-assign]
        serving = asyncio.create_task(world.followers[1].serve(engine, lambda answer: Transfers(1, answer), draws=False))
        other = asyncio.create_task(world.follow(2))
        await asyncio.to_thread(world.leader.wait_ready)
        run = world.leader.steps(Engine(0))
        await asyncio.to_thread(run, Batch(0, (Row(0, 0, (5,), ((0,),)),)), None, lambda output: None)
        assert isinstance(await asyncio.to_thread(world.deaths.get, timeout=WAIT_S), ArithmeticError)
        for task in (serving, other):
            task.cancel()

    asyncio.run(main())


def slip(batch: Batch, on_layer=None) -> StepOutput:
    raise ArithmeticError("slipped")

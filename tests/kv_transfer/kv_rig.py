"""Two workers' hinges with real pools, a real copy thread and real lanes, in one process or with one end in another.

A rig is what the contract suite needs of a transport; a further transport joins by a further name in `TRANSPORTS`.
"""

from __future__ import annotations

import asyncio
import os
import threading
import zlib
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diptych.core.clock import MonotonicClock
from diptych.core.errors import DiptychError, Unavailable
from diptych.core.fleet import WorkerReport
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout, RankLayout
from diptych.core.request import Token
from diptych.core.security import TlsFiles
from diptych.core.transfer import GroupGrant, LaneMessage, Transport
from diptych.kv_transfer import cuda_runtime, cuda_streams
from diptych.kv_transfer.destination import Destination
from diptych.kv_transfer.destination_rank import DestinationRank
from diptych.kv_transfer.device_memory import DeviceMemory
from diptych.kv_transfer.geometry import Geometry
from diptych.kv_transfer.lanes import DialLane, Lane
from diptych.kv_transfer.order_codec import decode, encode
from diptych.kv_transfer.pool import CPU, Pool
from diptych.kv_transfer.slices import first_positions
from diptych.kv_transfer.source import Source
from diptych.kv_transfer.source_rank import SourceRank
from diptych.kv_transfer.transports import wiring
from diptych.rpc.lane import dial_lane
from diptych.rpc.server import serve
from diptych.rpc.worker import RouterStream
from fake_cuda import FakeGpu
from fake_nccl import Fabric, FakeNccl

HOST = "127.0.0.1"
WAIT_S = 60.0
LONG_S = 30.0
"""A lease, or how long an Offer waits, that is not what a test is about: a machine that stands still for seconds changes nothing."""


@dataclass(frozen=True)
class Way:
    """A transport, and where the pools are. `fake`: what the test must put in (`faked`): the fake of NCCL, that of a GPU."""

    transport: Transport
    device: torch.device = CPU
    fake: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return " ".join((self.transport, *(f"fake-{what}" for what in sorted(self.fake))))


GPU = torch.device("cuda", 0)
SHM, GLOO, NCCL, CUDA_IPC = Way(Transport.SHM), Way(Transport.GLOO), Way(Transport.NCCL, GPU), Way(Transport.CUDA_IPC, GPU)
FAKE_NCCL, FAKE_GPU_NCCL = Way(Transport.NCCL, fake=frozenset({"nccl"})), Way(Transport.NCCL, fake=frozenset({"nccl", "gpu"}))
FAKE_CUDA_IPC = Way(Transport.CUDA_IPC, fake=frozenset({"gpu"}))
FAKED = [
    pytest.param(FAKE_NCCL, marks=pytest.mark.nightly, id=str(FAKE_NCCL)),  # what gloo and the next show each in part
    *(pytest.param(way, id=str(way)) for way in (FAKE_GPU_NCCL, FAKE_CUDA_IPC)),
]
ON_GPU = [pytest.param(way, marks=pytest.mark.gpu, id=str(way)) for way in (NCCL, CUDA_IPC)]
BETWEEN_PROCESSES = [*(pytest.param(way, id=str(way)) for way in (SHM, GLOO)), *ON_GPU]
TRANSPORTS = [*BETWEEN_PROCESSES, *FAKED]
BLOCK = 16
LAYOUT = Layout(
    "model",
    (
        CacheGroup(CacheKind.FULL, layers=(0, 2), kv_heads=2, head_dim=16, dtype=DType.FLOAT32),
        CacheGroup(CacheKind.WINDOW, layers=(1, 3, 4), kv_heads=1, head_dim=32, dtype=DType.BFLOAT16, window=40),
    ),
    BLOCK,
    num_blocks=(64, 64),
)
LAYERS = (0, 1, 2, 3, 4)
TOKENS = (Token(0, 42),)
Tables = tuple[tuple[int, ...], ...]


@contextmanager
def faked(way: Way, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the way needs of a test with both ends in one process."""
    fabric, gpu = Fabric(), FakeGpu()
    if "nccl" in way.fake:
        monkeypatch.setattr(wiring, "Nccl", lambda _: FakeNccl(fabric))
    if "gpu" in way.fake:
        gpu.install(monkeypatch)
        monkeypatch.setattr(ENGINE, "gpu", gpu)
    if way.device == GPU:
        monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
        open_in_one_process(monkeypatch)
    yield
    assert fabric.broken_rules == []
    assert fabric.alive == 0
    assert gpu.mapped == 0


class Engine:
    """Stores KV: at once, or when the fake of a GPU comes to it."""

    gpu: FakeGpu | None = None

    def store(self, store: Callable[[], None]) -> None:
        if self.gpu is None:
            store()
        else:
            self.gpu.ask(store)

    def finish(self) -> None:
        """What was computed is seen on the host."""
        if self.gpu is not None:
            self.gpu.finish()


ENGINE = Engine()


def open_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA opens no handle in the process that made it: what was exported is looked up instead."""
    made: dict[bytes, Any] = {}

    def remember(kind: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
        def export(thing: Any) -> bytes:
            handle = kind(thing)
            made[handle] = thing
            return handle

        return export

    for module in (cuda_runtime, cuda_streams):
        monkeypatch.setattr(module, "handle_of", remember(module.handle_of))
    monkeypatch.setattr(cuda_streams, "open_event", lambda _, handle: made[handle])
    monkeypatch.setattr(cuda_runtime, "open_handle", made.__getitem__)
    monkeypatch.setattr(cuda_runtime, "close_handle", lambda _: None)


def layout_with(num_blocks: int, like: Layout = LAYOUT) -> Layout:
    return replace(like, num_blocks=(num_blocks,) * len(like.groups))


def pools_of(layout: Layout, way: Way) -> list[Pool]:
    """One for each rank."""
    layouts = [layout.on(rank).layout for rank in range(layout.ranks)]
    if "gpu" not in way.fake:
        return [Pool.allocate(each, way.device) for each in layouts]
    return [
        Pool(each, DeviceMemory(Geometry(each).size, [layer for group in each.groups for layer in group.layers], CPU)) for each in layouts
    ]


def expected_rows(transfer_id: str, layer: int, group: CacheGroup, start: int, stop: int) -> torch.Tensor:
    """What positions [start, stop) hold, [stop - start, kv_heads, 2, head_dim]; whole numbers below 251, exact in any dtype."""
    width = 2 * group.kv_heads * group.head_dim
    first = zlib.crc32(f"{transfer_id}/{layer}".encode()) % 251
    numbers = (first + 7 * torch.arange(start, stop)[:, None] + torch.arange(width)[None, :]) % 251
    return numbers.view(stop - start, group.kv_heads, 2, group.head_dim)


def write(pool: Pool, held: RankLayout, transfer_id: str, layers: tuple[int, ...], start: int, stop: int, tables: Tables) -> None:
    """Do what a rank's engine does: store KV of positions [start, stop) of those `layers` and heads that it holds."""
    size = held.layout.block_size
    for cache, number, layer in _caches(pool):
        if layer in layers:
            rows = _rows(held, number, transfer_id, layer, start, stop).to(cache)
            for position in range(start, stop):
                cache[tables[number][position // size], :, :, position % size] = rows[position - start]


def verify(
    pool: Pool, held: RankLayout, transfer_id: str, groups: tuple[GroupGrant, ...], firsts: tuple[int, ...], prompt_tokens: int
) -> None:
    """Every position from `firsts[g]` on holds what the source wrote, head by head as the rank's numbers say."""
    size = held.layout.block_size
    for cache, number, layer in _caches(pool):
        first, granted = firsts[number], groups[number]
        wanted = _rows(held, number, transfer_id, layer, first, prompt_tokens).to(cache)
        for position in range(first, prompt_tokens):
            block = granted.blocks[(position - granted.first_position) // size]
            found = cache[block, :, :, position % size]
            assert torch.equal(found, wanted[position - first]), f"rank {held.rank} layer {layer} position {position} of {transfer_id}"


def _rows(held: RankLayout, group: int, transfer_id: str, layer: int, start: int, stop: int) -> torch.Tensor:
    heads = held.heads(group)
    return expected_rows(transfer_id, layer, LAYOUT.groups[group], start, stop)[:, heads.start : heads.stop]


def _caches(pool: Pool) -> list[tuple[torch.Tensor, int, int]]:
    """Each layer's cache, its group's number, its own."""
    return [
        (pool.caches[number][index], number, layer)
        for number, group in enumerate(pool.layout.groups)
        for index, layer in enumerate(group.layers)
    ]


class Channel:
    """A rank as if in a process of its own: orders and answers go as bytes, in order, and take a turn of the loop."""

    def __init__(self, make: Callable[[Callable[[Any], None]], SourceRank | DestinationRank], answer: Callable[[Any], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._rank = make(lambda said: self._send(answer, said))
        self.endpoint = self._rank.endpoint

    def carry_out(self, order: Any) -> None:
        self._send(self._rank.carry_out, order)

    async def close(self) -> None:
        await asyncio.sleep(0)
        await self._rank.close()
        assert not self._rank.lanes

    def _send(self, take: Callable[[Any], None], value: Any) -> None:
        data = encode(value)
        self._loop.call_soon(lambda: take(decode(data)))


def behind_channels(kind: Any, layout: Layout, pools: list[Pool], silence_s: float) -> Callable[[Callable[[Any], None]], list[Channel]]:
    """The ranks from 1 on, of `kind`."""

    def made(rank: int) -> Callable[[Callable[[Any], None]], Any]:
        return lambda answer: kind(rank, pools[rank], layout, host=HOST, silence_s=silence_s, answer=answer)

    return lambda answer: [Channel(made(rank), answer) for rank in range(1, layout.ranks)]


class Blocks:
    """The simplest allocator: free blocks per group, the newest freed first, so that orders get mixed."""

    def __init__(self, layout: Layout) -> None:
        self.free = [list(range(count)) for count in layout.num_blocks]
        self.lent: dict[str, list[tuple[int, ...]]] = {}

    def take(self, transfer_id: str, counts: list[int]) -> Tables | None:
        if any(len(free) < count for free, count in zip(self.free, counts, strict=True)):
            return None
        taken = [tuple(free.pop() for _ in range(count)) for free, count in zip(self.free, counts, strict=True)]
        self.lent[transfer_id] = taken
        return tuple(taken)

    def give_back(self, transfer_id: str) -> None:
        for free, blocks in zip(self.free, self.lent.pop(transfer_id, [(), ()]), strict=True):
            free.extend(blocks)


class Diary:
    """What was told, in order, and a way to wait for it."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.errors: dict[str, DiptychError] = {}
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def write(self, what: str, transfer_id: str) -> None:
        self.lines.append((what, transfer_id))
        task = asyncio.get_running_loop().create_task(self._tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    def of(self, transfer_id: str) -> list[str]:
        return [what for what, about in self.lines if about == transfer_id]

    async def wait(self, what: str, transfer_id: str, within_s: float = WAIT_S) -> None:
        async with asyncio.timeout(within_s), self._news:
            await self._news.wait_for(lambda: (what, transfer_id) in self.lines)


class PrefillEnd:
    """A worker that computes prompts as it is told, and hands them over."""

    def __init__(
        self,
        layout: Layout,
        pools: list[Pool],
        lease_s: float,
        dial: DialLane | None,
        worker_id: str = "P",
        incarnation: int = 1,
        transports: tuple[Transport, ...] = (Transport.SHM,),
    ) -> None:
        self.transports = transports
        self.layout, self.pools = layout, pools
        self.blocks = Blocks(layout)
        self.diary = Diary()
        self.prompts: dict[str, tuple[int, Tables]] = {}
        self.bytes: dict[str, int] = {}
        self.turned_away_said = 0
        self._freed = asyncio.Event()
        self.source = Source(
            worker_id,
            incarnation,
            pools[0],
            layout,
            MonotonicClock(),
            lease_s,
            self,
            transports=transports,
            host=HOST,
            dial=dial or dial_lane,
            others=behind_channels(SourceRank, layout, pools, lease_s),
        )

    def granted(self, transfer_id: str) -> None:
        self.diary.write("granted", transfer_id)

    def turned_away(self) -> None:
        self.turned_away_said += 1

    def handed_over(self, transfer_id: str, kv_bytes: int, seconds: float, transport: str) -> None:
        assert transport in self.transports
        assert seconds >= 0
        self.bytes[transfer_id] = kv_bytes
        self.diary.write("handed over", transfer_id)

    def failed(self, transfer_id: str, error: DiptychError) -> None:
        self.diary.errors[transfer_id] = error
        self.diary.write("failed", transfer_id)

    def released(self, transfer_id: str) -> None:
        """The blocks are another's at once."""
        prompt = self.prompts.pop(transfer_id, None)
        if prompt is not None:
            for pool, (group, table) in product(self.pools, enumerate(prompt[1])):
                for cache in pool.caches[group]:
                    ENGINE.store(partial(cache.__setitem__, list(table), -1))
        self.blocks.give_back(transfer_id)
        self._freed.set()
        self.diary.write("released", transfer_id)

    def offer(self, transfer_id: str, address: str, tokens: int) -> bool:
        """False if there are not the blocks for it."""
        tables = self.blocks.take(transfer_id, [-(-tokens // self.layout.block_size)] * len(self.layout.groups))
        if tables is None:
            return False
        self.prompts[transfer_id] = (tokens, tables)
        self.source.offer(transfer_id, address, tokens)
        return True

    async def offer_when_it_fits(self, transfer_id: str, address: str, tokens: int) -> None:
        while not self.offer(transfer_id, address, tokens):
            self._freed.clear()
            await self._freed.wait()

    def compute(self, transfer_id: str, layers: tuple[int, ...], start: int, stop: int) -> None:
        """On every rank that holds any of `layers`."""
        tables = self.prompts[transfer_id][1]
        for rank, pool in enumerate(self.pools):
            held = self.layout.on(rank)
            here = tuple(layer for layer in layers if any(layer in group.layers for group in held.layout.groups))
            ENGINE.store(partial(write, pool, held, transfer_id, here, start, stop, tables))
            for layer in here:
                pool.stored(layer)
            self.source.computed(transfer_id, here, start, stop, tables, rank)

    async def compute_all(self, transfer_id: str, chunk: int = 24) -> None:
        """Layer by layer, chunk by chunk, a turn of the loop in between; then commit."""
        tokens = self.prompts[transfer_id][0] if transfer_id in self.prompts else 0
        steps = [(layer, start) for start in range(0, tokens, chunk) for layer in LAYERS]
        for layer, start in steps:
            if transfer_id not in self.prompts:
                return
            self.compute(transfer_id, (layer,), start, min(start + chunk, tokens))
            await asyncio.sleep(0)
        ENGINE.finish()
        self.source.commit(transfer_id, TOKENS)


class DecodeEnd:
    """A worker that grants what fits, in the order of Offers, and verifies what comes."""

    def __init__(
        self,
        layout: Layout,
        pools: list[Pool],
        lease_s: float,
        worker_id: str = "D",
        incarnation: int = 2,
        offer_wait_s: float = LONG_S,
        transports: tuple[Transport, ...] = (Transport.SHM,),
    ) -> None:
        self.layout, self.pools = layout, pools
        self.comes_from = layout
        """The layout of whoever hands over here."""
        self.blocks = Blocks(layout)
        self.diary = Diary()
        self.waiting: deque[tuple[str, int]] = deque()
        self.granted: dict[str, tuple[int, tuple[GroupGrant, ...]]] = {}
        self.cached_blocks: dict[str, int] = Counter()
        self.holding = False
        self.nearly_done_said: list[str] = []
        self.bytes: dict[str, int] = {}
        self.destination = Destination(
            worker_id,
            incarnation,
            pools[0],
            layout,
            MonotonicClock(),
            lease_s,
            offer_wait_s,
            self,
            transports=transports,
            host=HOST,
            others=behind_channels(DestinationRank, layout, pools, lease_s),
        )

    def offered(self, transfer_id: str, prompt_tokens: int) -> None:
        self.diary.write("offered", transfer_id)
        self.waiting.append((transfer_id, prompt_tokens))
        self.grant_what_fits()

    def nearly_done(self, transfer_id: str) -> None:
        self.nearly_done_said.append(transfer_id)

    def committed(self, transfer_id: str, first_tokens: tuple[Token, ...], kv_bytes: int, seconds: float, lacking: tuple[int, ...]) -> None:
        assert first_tokens == TOKENS
        tokens, groups = self.granted.pop(transfer_id)
        firsts = first_positions(self.comes_from, groups, tokens)
        for rank, pool in enumerate(self.pools):
            verify(pool, self.layout.on(rank), transfer_id, groups, firsts, tokens)
        self.bytes[transfer_id] = kv_bytes
        self.diary.write("committed", transfer_id)
        self.blocks.give_back(transfer_id)
        self.grant_what_fits()

    def failed(self, transfer_id: str, error: DiptychError) -> None:
        self.waiting = deque(offer for offer in self.waiting if offer[0] != transfer_id)
        self.diary.errors[transfer_id] = error
        self.diary.write("failed", transfer_id)

    def released(self, transfer_id: str) -> None:
        self.granted.pop(transfer_id, None)
        self.blocks.give_back(transfer_id)
        self.diary.write("released", transfer_id)
        self.grant_what_fits()

    def grant_what_fits(self) -> None:
        while self.waiting and not self.holding:
            transfer_id, tokens = self.waiting[0]
            size = self.layout.block_size
            cached = min(self.cached_blocks[transfer_id] * size, tokens // size * size)
            firsts = [max(cached, group.first_needed(tokens) // size * size) for group in self.layout.groups]
            tables = self.blocks.take(transfer_id, [-(-(tokens - first) // size) for first in firsts])
            if tables is None:
                return
            self.waiting.popleft()
            groups = tuple(GroupGrant(first, table) for first, table in zip(firsts, tables, strict=True))
            self.granted[transfer_id] = (tokens, groups)
            self.destination.grant(transfer_id, groups)


async def eventually(condition: Callable[[], object], within_s: float = WAIT_S) -> None:
    """Until `condition` holds, for what nobody tells."""
    for _ in range(int(within_s / 0.002)):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError(f"not within {within_s} s")


def _links(pid: int | str) -> set[str]:
    directory = f"/proc/{pid}/fd"
    return {os.readlink(f"{directory}/{fd}") for fd in os.listdir(directory) if os.path.islink(f"{directory}/{fd}")}


def pool_sockets() -> dict[str, str]:
    """Inode → name of every socket on this host that hands out a pool."""
    lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines() if "@diptych-kv" in line)
    return {fields[6]: fields[7] for fields in lines}


def pool_sockets_of(pid: int | str) -> set[str]:
    links = _links(pid)
    return {name for inode, name in pool_sockets().items() if f"socket:[{inode}]" in links}


def left_behind() -> list[str]:
    """What this process still holds of any pool: mappings, memfds, sockets that hand them out, threads."""
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "diptych-kv" in line]
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("diptych")]
    return [*(link for link in _links("self") if "diptych-kv" in link), *pool_sockets_of("self"), *maps, *threads]


class LaneFace:
    """As much of a worker as a lane needs."""

    def __init__(self, serve_lane: Callable[[Lane], object]) -> None:
        self._serve_lane = serve_lane

    async def attached(self, stream: RouterStream) -> None:
        raise NotImplementedError

    async def reports(self) -> AsyncGenerator[WorkerReport, None]:
        raise NotImplementedError
        yield

    async def lane(self, lane: Lane) -> None:
        await self._serve_lane(lane)  # type: ignore[misc]

    async def drain(self, timeout_s: float) -> int:
        raise NotImplementedError


class ThreadLane:
    """One end of a lane inside this process; `cut` is what a broken connection looks like from both ends."""

    def __init__(self) -> None:
        self._inbox: asyncio.Queue[LaneMessage | DiptychError | None] = asyncio.Queue()
        self.other: ThreadLane | None = None
        self._ended = False

    def send(self, message: LaneMessage) -> None:
        if not self._ended and self.other is not None:
            self.other._inbox.put_nowait(message)

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            self._inbox.put_nowait(None)
            if self.other is not None:
                self.other._inbox.put_nowait(None)

    def cut(self) -> None:
        for end in (self, self.other):
            assert end is not None
            end._ended = True
            end._inbox.put_nowait(Unavailable("The connection was reset."))

    async def each(self, take: Callable[[LaneMessage], None]) -> None:
        while (message := await self._inbox.get()) is not None:
            if isinstance(message, DiptychError):
                raise message
            take(message)


class Exchange:
    """Where in-process lanes are dialled: address → destination."""

    def __init__(self) -> None:
        self.destinations: dict[str, Destination] = {}
        self.lanes: list[ThreadLane] = []
        self.tasks: set[asyncio.Task[None]] = set()

    async def dial(self, address: str) -> Lane:
        if address not in self.destinations:
            raise Unavailable(f"Nobody answers at {address}.")
        near, far = ThreadLane(), ThreadLane()
        near.other, far.other = far, near
        self.lanes.append(near)
        task = asyncio.create_task(self.destinations[address].serve_lane(far))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return near


@asynccontextmanager
async def rig(
    way: Way,
    *,
    grpc: bool = False,
    lease_s: float = LONG_S,
    source_blocks: int = 64,
    destination_blocks: int = 64,
    offer_wait_s: float = LONG_S,
    here: Layout = LAYOUT,
    there: Layout = LAYOUT,
) -> AsyncIterator[tuple[PrefillEnd, DecodeEnd, str, Exchange]]:
    """Both ends, the destination's address, and the in-process exchange. At the end nothing may be left on either side. The source's
    layout is like `here`, the destination's like `there`."""
    exchange = Exchange()
    async with (
        decode_end(way, exchange, grpc, lease_s, destination_blocks, offer_wait_s, like=there) as (decode, address),
        prefill_end(way, None if grpc else exchange.dial, lease_s, source_blocks, like=here) as prefill,
    ):
        decode.comes_from = prefill.layout
        yield prefill, decode, address, exchange


@asynccontextmanager
async def prefill_end(
    way: Way, dial: DialLane | None, lease_s: float, blocks: int = 64, worker_id: str = "P", like: Layout = LAYOUT
) -> AsyncIterator[PrefillEnd]:
    """`dial` None: over gRPC."""
    layout = layout_with(blocks, like)
    pools = pools_of(layout, way)
    prefill = PrefillEnd(layout, pools, lease_s, dial, worker_id, transports=(way.transport,))
    try:
        yield prefill
    finally:
        await prefill.source.close()
        ENGINE.finish()
        prefill.source.check()
        for pool in pools:
            pool.close()
    assert prefill.source.leases == 0
    assert not prefill.blocks.lent


@asynccontextmanager
async def decode_end(
    way: Way,
    exchange: Exchange,
    grpc: bool,
    lease_s: float,
    blocks: int = 64,
    offer_wait_s: float = LONG_S,
    worker_id: str = "D",
    like: Layout = LAYOUT,
    tls: TlsFiles | None = None,
) -> AsyncIterator[tuple[DecodeEnd, str]]:
    """A destination and its address, on gRPC (under `tls`) or in `exchange`."""
    layout = layout_with(blocks, like)
    pools = pools_of(layout, way)
    decode = DecodeEnd(layout, pools, lease_s, worker_id, offer_wait_s=offer_wait_s, transports=(way.transport,))
    server = await serve("127.0.0.1:0", worker=LaneFace(decode.destination.serve_lane), tls=tls) if grpc else None
    address = server.address if server else worker_id
    exchange.destinations[address] = decode.destination
    try:
        yield decode, address
    finally:
        exchange.destinations.pop(address, None)
        await decode.destination.close()
        if server is not None:
            await server.stop(0)
        if exchange.tasks:
            await asyncio.wait(exchange.tasks)
        decode.destination.check()
        for pool in pools:
            pool.close()
    assert decode.destination.leases == 0
    assert not decode.blocks.lent

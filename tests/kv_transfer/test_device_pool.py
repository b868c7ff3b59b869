"""A pool on a GPU, over the fake of one: what peers find in its file, and what is said where it cannot be had or reached."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from itertools import accumulate, takewhile
from weakref import ref

import pytest
import torch
from diptych.core.errors import ConfigError, TransferFailed
from diptych.kv_transfer import slots
from diptych.kv_transfer.actions import Copy
from diptych.kv_transfer.coverage import Span
from diptych.kv_transfer.crossing import Crossing
from diptych.kv_transfer.cuda_streams import Streams, pauses
from diptych.kv_transfer.device_memory import DeviceMemory, handles, shared_bytes
from diptych.kv_transfer.geometry import Geometry
from diptych.kv_transfer.pool import CPU, Pool
from diptych.kv_transfer.slices import routes
from diptych.kv_transfer.transports import cuda_ipc
from diptych.kv_transfer.transports.copy_thread import Copies
from diptych.kv_transfer.transports.cuda_ipc import DevicePool
from fake_cuda import FakeGpu, Silence
from kv_rig import LAYERS, LAYOUT, eventually, layout_with, left_behind


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    made = FakeGpu()
    made.install(monkeypatch)
    yield made
    assert made.mapped == 0
    assert left_behind() == []


def on_gpu(blocks: int = 8) -> Pool:
    layout = layout_with(blocks)
    return Pool(layout, DeviceMemory(Geometry(layout).size, [layer for group in layout.groups for layer in group.layers], CPU))


async def attached(pool: Pool, silence_s: float = 20) -> DevicePool:
    loop = asyncio.get_running_loop()
    loop.add_reader(pool.listener, pool.hand_out)
    try:
        return await cuda_ipc.attach("P", pool.endpoint, pool.layout, CPU, silence_s)
    finally:
        loop.remove_reader(pool.listener)


def test_caches_are_zeros_of_the_layouts_shape(gpu: FakeGpu) -> None:
    pool = on_gpu()
    for group, caches in zip(LAYOUT.groups, pool.caches, strict=True):
        for cache in caches:
            assert cache.shape == (8, group.kv_heads, 2, 16, group.head_dim)
            assert not cache.any()
    assert len(gpu.allocated) == 1, "one allocation, so that its handle is that of the pool"
    pool.close()


def test_a_peer_finds_memory_events_and_words_in_its_file(gpu: FakeGpu) -> None:
    pool = on_gpu()
    peer = asyncio.run(attached(pool))
    pool.caches[1][2].fill_(3)
    pool.set_word(7, 2**63 + 5)
    assert peer.file.word(7) == 2**63 + 5
    offset = pool.geometry.offsets[LAYOUT.groups[1].layers[2]]
    assert peer.whole[offset : offset + 2].view(torch.bfloat16).item() == 3
    assert len(peer.file.mapped) == shared_bytes(len(LAYERS)) < pool.geometry.size, "no KV is in it"
    assert len(set(handles(memoryview(peer.file.mapped), len(LAYERS)))) == 1 + len(LAYERS)
    peer.close()
    pool.close()


def test_what_is_waited_for_is_the_layers_last_store_and_no_later_one(gpu: FakeGpu) -> None:
    pool, stores = on_gpu(), []
    for store, layer in enumerate((0, 1, 0, 2)):
        gpu.ask(lambda store=store: stores.append(store))
        pool.stored(layer)
    assert stores == []
    pool.await_stored(1)
    assert stores == [0, 1]
    pool.await_stored(0)
    assert stores == [0, 1, 2]
    pool.close()
    assert stores == [0, 1, 2], "nobody waits for a GPU that may wait for a peer which has died"
    assert gpu.allocated, "a peer may still have it mapped"


def test_events_that_a_peer_may_have_open_outlive_the_pool(gpu: FakeGpu) -> None:
    pool = on_gpu()
    events = [ref(thing) for thing in gpu.exported.values() if not isinstance(thing, int)]
    pool.close()
    del pool
    gpu.exported.clear()
    gc.collect()
    assert len(events) == len(LAYERS)
    assert all(event() is not None for event in events)


def test_too_large_a_pool_is_refused_at_start(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be had on cpu: CUDA says cudaErrorMemoryAllocation") as caught:
        on_gpu(1 << 20)
    assert caught.value.field == "kv_tokens"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 40))
    with pytest.raises(ConfigError, match="has 1 MiB free; lower kv_tokens") as caught:
        on_gpu(512)
    assert caught.value.field == "kv_tokens"


def test_a_driver_too_old_for_the_bindings_is_told_apart_from_too_large_a_pool(gpu: FakeGpu) -> None:
    gpu.runtime.driver = 12080
    with pytest.raises(ConfigError, match=r"driver is for CUDA 12, .* need one for 13: pip install 'cuda-bindings<13', or") as caught:
        on_gpu()
    assert caught.value.field == "device"


def test_memory_that_cannot_be_mapped_is_said(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = on_gpu()
    gpu.exported = {handle: thing if not isinstance(thing, int) else 0 for handle, thing in gpu.exported.items()}
    with pytest.raises(TransferFailed, match=r"P cannot be reached by CUDA IPC from here \(CUDA says cudaErrorInvalid"):
        asyncio.run(attached(pool))
    pool.close()


class Bench:
    """A destination's copy thread, and what it told."""

    def __init__(self, into: Pool) -> None:
        self.into, self.told, self.fenced = into, dict[tuple[str, int], str | None](), list[str]()
        self.copies = Copies(into, lambda name, seq, error: self.told.setdefault((name, seq), error), self.fenced.append)

    def copy(self, pool: Pool, peer: DevicePool, name: str, seq: int, block: int = 0) -> None:
        crossing = Crossing(routes(pool.layout, self.into.layout)[0], pool.layout, self.into.layout)
        span = Span(0, pool.layout.groups[0].layers[:1], 0, 1)
        self.copies.copy(peer, crossing, Copy(1, name, seq, span, (0,), (block,), slot=0, word=0, route=0))

    async def end(self, *peers: DevicePool) -> None:
        for peer in peers:
            self.copies.detach(peer)
        await asyncio.wait_for(asyncio.to_thread(self.copies.close), 20)


def stored(value: int) -> Pool:
    """A source's; what it said of its first layer is stored when its GPU is not silent."""
    pool = on_gpu()
    for cache in (cache for group in pool.caches for cache in group):
        cache.fill_(value)
    pool.stored(pool.layout.groups[0].layers[0])
    return pool


def blocks_of(pool: Pool) -> list[float]:
    """What each block of the first layer begins with."""
    return [float(block.flatten()[0]) for block in pool.caches[0][0]]


def test_what_a_killed_source_never_stores_holds_nothing_up(gpu: FakeGpu) -> None:
    """Its fence is answered, others' pieces go on, no copy is left that a GPU could make later, and both can be unmapped."""
    gpu.silence = Silence()
    killed, into = stored(1), on_gpu()
    gpu.silence = None
    lives = stored(2)

    async def run() -> None:
        silent, speaks = await attached(killed, silence_s=600), await attached(lives)
        bench = Bench(into)
        for seq in range(2):
            bench.copy(killed, silent, "a", seq)
        bench.copy(lives, speaks, "b", 0, block=1)
        bench.copy(killed, silent, "c", 0)
        await eventually(lambda: bench.told == {("b", 0): None})
        bench.copies.fence("a")
        await eventually(lambda: bench.fenced == ["a"])
        bench.copy(lives, speaks, "b", 1, block=2)
        await eventually(lambda: bench.told == {("b", 0): None, ("b", 1): None})
        bench.copies.fence("c")
        await bench.end(silent, speaks)
        assert set(bench.told) == {("b", 0), ("b", 1)}

    asyncio.run(run())
    assert blocks_of(into) == [0, 2, 2, 0, 0, 0, 0, 0]
    for pool in (killed, lives, into):
        pool.close()


def test_a_source_that_is_silent_for_too_long_fails_its_pieces_until_it_speaks(gpu: FakeGpu) -> None:
    gpu.silence = silence = Silence()
    source, into = stored(1), on_gpu()
    gpu.silence = None

    async def run() -> None:
        peer = await attached(source, silence_s=0.05)
        bench = Bench(into)
        for seq in range(2):
            bench.copy(source, peer, "a", seq)
        await eventually(lambda: len(bench.told) == 2)
        assert all(error and "GPU has not stored what was announced within 0.05 s" in error for error in bench.told.values())
        bench.copies.fence("a")
        await eventually(lambda: bench.fenced == ["a"])
        assert blocks_of(into)[0] == 0
        silence.over = True
        bench.copy(source, peer, "b", 0)
        await eventually(lambda: bench.told.get(("b", 0), "") is None)
        assert blocks_of(into)[0] == 1
        await bench.end(peer)

    asyncio.run(run())
    source.close()
    into.close()


def test_a_layer_that_was_seen_to_be_stored_may_be_stored_anew_before_the_others_are(gpu: FakeGpu) -> None:
    source = on_gpu()
    first, other = source.layout.groups[0].layers
    gpu.silence = silence = Silence()
    source.stored(other)
    gpu.silence = None
    source.stored(first)
    peer = asyncio.run(attached(source))
    come = peer.stored([Copy(1, "a", 0, Span(0, (first, other), 0, 1), (0,), (0,), slot=0, word=0, route=0)])
    assert not come()
    gpu.silence = Silence()
    source.stored(first)
    assert not come()
    silence.over = True
    assert come()
    peer.close()
    source.close()


def test_pools_that_are_mapped_again_use_the_streams_of_those_before(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ipc, "STREAMS", Streams())
    source = on_gpu()
    for _ in range(3):
        peers = [asyncio.run(attached(source)) for _ in range(2)]
        for peer in peers:
            peer.close()
    assert gpu.streams == 2
    source.close()


def test_slots_that_there_is_no_memory_for_leave_their_stream_to_the_next(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "STREAMS", Streams())
    pool = on_gpu()
    crossing = Crossing(routes(pool.layout, pool.layout)[0], pool.layout, pool.layout)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="allocate"):
            slots.DeviceSlots(pool, crossing, 1 << 50)
    assert gpu.streams == 1
    pool.close()


def test_who_can_only_look_whether_a_gpu_is_done_looks_ever_less_often() -> None:
    def looks(seconds: float) -> int:
        return sum(1 for _ in takewhile(lambda waited: waited < seconds, accumulate(pauses())))

    assert looks(50e-6) == 0 < looks(0.5e-3) < 10
    assert looks(2.0) - looks(1.0) == pytest.approx(1000, abs=1)

"""What every transport must do, in one process: order, abort in the middle, stale epochs, random cancels, back-pressure."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from diptych.core.errors import Cancelled, TransferFailed
from diptych.core.layout import DType, Layout
from diptych.core.transfer import RefusedReason
from kv_rig import (
    BLOCK,
    LAYERS,
    LAYOUT,
    LONG_S,
    TOKENS,
    TRANSPORTS,
    DecodeEnd,
    Exchange,
    PrefillEnd,
    Way,
    decode_end,
    eventually,
    faked,
    prefill_end,
    rig,
)

Cut = Callable[[], None]
SPREADS = {
    "tp1 to tp2": ((1, ()), (2, ())),
    "tp2 to tp1": ((2, ()), (1, ())),
    "tp2 to tp4": ((2, ()), (4, ())),
    "pp2 to pp1": ((1, (3, 2)), (1, ())),
    "uneven pp3 to pp2": ((1, (1, 3, 1)), (1, (2, 3))),
    "tp4 to tp2 pp2": ((4, ()), (2, (2, 3))),
}
"""(tp, stages) of the source and of the destination. Both groups' heads lie on several ranks of four, the window group's on both of two."""


def layouts(pair: tuple[tuple[int, tuple[int, ...]], ...]) -> tuple[Layout, Layout]:
    here, there = (replace(LAYOUT, tp=tp, stages=stages) for tp, stages in pair)
    return here, there


spread = pytest.mark.parametrize(("here", "there"), list(map(layouts, SPREADS.values())), ids=list(SPREADS))
pytestmark = pytest.mark.parametrize("way", TRANSPORTS)


@pytest.fixture(autouse=True)
def faked_way(nothing_left: None, way: Way, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with faked(way, monkeypatch):
        yield


async def hand_over(prefill: PrefillEnd, decode: DecodeEnd, address: str, transfer_id: str, tokens: int, chunk: int = 24) -> None:
    decode.destination.expect(transfer_id)
    prefill.offer(transfer_id, address, tokens)
    await prefill.compute_all(transfer_id, chunk)
    await prefill.diary.wait("released", transfer_id)


def kv_bytes(tokens: int, cached: int = 0, there: Layout = LAYOUT) -> int:
    """Bytes of a prompt that lacks its first `cached` tokens at the destination; a window group's share is its window's blocks. A head
    that several ranks hold goes to each."""
    firsts = [max(cached, group.first_needed(tokens) // BLOCK * BLOCK) for group in LAYOUT.groups]
    shares = (zip(there.on(rank).layout.groups, firsts, strict=True) for rank in range(there.ranks))
    return sum((tokens - first) * group.token_bytes * len(group.layers) for share in shares for group, first in share)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 40, 41, 57, 100, 333])
def test_every_byte_arrives_once(way: Way, tokens: int) -> None:
    async def run() -> None:
        async with rig(way) as (prefill, decode, address, _):
            await hand_over(prefill, decode, address, "a", tokens)
            assert prefill.diary.of("a") == ["granted", "handed over", "released"]
            assert decode.diary.of("a") == ["offered", "committed"]
            assert prefill.bytes["a"] == decode.bytes["a"] == kv_bytes(tokens)

    asyncio.run(run())


@spread
def test_every_byte_arrives_on_every_rank_that_holds_it(way: Way, here: Layout, there: Layout) -> None:
    async def run() -> None:
        async with rig(way, here=here, there=there) as (prefill, decode, address, _):
            for tokens, cached in ((1, 0), (16, 0), (57, 0), (100, 3), (64, 4), (333, 0)):
                name = f"{tokens} tokens"
                decode.cached_blocks[name] = cached
                await hand_over(prefill, decode, address, name, tokens)
                assert prefill.diary.of(name) == ["granted", "handed over", "released"]
                assert decode.diary.of(name) == ["offered", "committed"]
                assert prefill.bytes[name] == decode.bytes[name] == kv_bytes(tokens, BLOCK * cached, there)

    asyncio.run(run())


@pytest.mark.parametrize(("size", "size_there", "tp", "tp_there"), [(16, 8, 1, 1), (8, 16, 1, 2), (16, 48, 2, 1), (12, 16, 2, 4)])
def test_any_block_size_to_any(way: Way, size: int, size_there: int, tp: int, tp_there: int) -> None:
    here, there = replace(LAYOUT, block_size=size, tp=tp), replace(LAYOUT, block_size=size_there, tp=tp_there)

    async def run() -> None:
        async with rig(way, here=here, there=there) as (prefill, decode, address, _):
            for tokens, cached in ((1, 0), (16, 0), (57, 1), (100, 2), (333, 0)):
                name = f"{tokens} tokens"
                decode.cached_blocks[name] = cached
                await hand_over(prefill, decode, address, name, tokens)
                assert decode.diary.of(name) == ["offered", "committed"]

    asyncio.run(run())


HALF = {DType.FLOAT32: DType.FLOAT16, DType.BFLOAT16: DType.FLOAT16}


def in_dtypes(dtypes: dict[DType, DType], tp: int) -> Layout:
    return replace(LAYOUT, tp=tp, groups=tuple(replace(group, dtype=dtypes[group.dtype]) for group in LAYOUT.groups))


@pytest.mark.parametrize(("tp", "tp_there"), [(1, 1), (2, 1), (1, 4)])
def test_kv_is_cast_on_the_way(way: Way, tp: int, tp_there: int) -> None:
    """One group from float32 to bfloat16, the other back; it crosses as the source has it."""
    here = replace(LAYOUT, tp=tp)
    there = in_dtypes({DType.FLOAT32: DType.BFLOAT16, DType.BFLOAT16: DType.FLOAT32}, tp_there)

    async def run() -> None:
        async with rig(way, here=here, there=there) as (prefill, decode, address, _):
            for tokens in (1, 57, 100):
                await hand_over(prefill, decode, address, f"t{tokens}", tokens)
                assert decode.bytes[f"t{tokens}"] == kv_bytes(tokens, 0, replace(LAYOUT, tp=tp_there))

    asyncio.run(run())


@pytest.mark.parametrize("into", [True, False])
def test_float16_is_cast_both_ways(way: Way, into: bool) -> None:
    ends = LAYOUT, in_dtypes(HALF, 2)

    async def run() -> None:
        here, there = ends if into else ends[::-1]
        async with rig(way, here=here, there=there) as (prefill, decode, address, _):
            for tokens in (1, 57, 100):
                await hand_over(prefill, decode, address, f"t{tokens}", tokens)
                assert decode.diary.of(f"t{tokens}") == ["offered", "committed"]

    asyncio.run(run())


def test_what_float16_cannot_hold_fails_its_transfer_alone(way: Way) -> None:
    async def run() -> None:
        async with rig(way, there=in_dtypes(HALF, 1)) as (prefill, decode, address, exchange):
            decode.destination.expect("a")
            prefill.offer("a", address, 40)
            for layer in LAYERS:
                prefill.compute("a", (layer,), 0, 20)
            _, tables = prefill.prompts["a"]
            prefill.pools[0].caches[1][1][tables[1][1]] = 70000.0
            prefill.pools[0].stored(3)
            prefill.compute("a", (0, 1, 2, 4), 20, 40)
            prefill.source.computed("a", (3,), 20, 40, tables)
            prefill.source.commit("a", TOKENS)
            await prefill.diary.wait("released", "a")
            await decode.diary.wait("released", "a")
            for end in (prefill, decode):
                assert isinstance(end.diary.errors["a"], TransferFailed)
                assert "float16, in which it is to be held here, ends at 65504" in end.diary.errors["a"].message
            await hand_over(prefill, decode, address, "b", 100)
            assert decode.diary.of("b") == ["offered", "committed"]
            assert len(exchange.lanes) == 1

    asyncio.run(run())


@spread
def test_many_ranks_over_grpc_lanes(way: Way, here: Layout, there: Layout) -> None:
    async def run() -> None:
        async with rig(way, grpc=True, here=here, there=there) as (prefill, decode, address, _):
            await asyncio.gather(*(hand_over(prefill, decode, address, f"t{tokens}", tokens) for tokens in (20, 41, 77)))

    asyncio.run(run())


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_over_grpc_lanes(way: Way, chunk: int) -> None:
    async def run() -> None:
        async with rig(way, grpc=True) as (prefill, decode, address, _):
            await hand_over(prefill, decode, address, "a", 77, chunk)
            await hand_over(prefill, decode, address, "b", 140, chunk)
            assert decode.bytes == {"a": kv_bytes(77), "b": kv_bytes(140)}

    asyncio.run(run())


def test_only_what_the_destination_lacks_is_sent(way: Way) -> None:
    async def run() -> None:
        async with rig(way) as (prefill, decode, address, _):
            decode.cached_blocks["a"] = 3
            decode.cached_blocks["b"] = 4
            await hand_over(prefill, decode, address, "a", 100)
            await hand_over(prefill, decode, address, "b", 64)
            assert decode.bytes == {"a": kv_bytes(100, 48), "b": 0}

    asyncio.run(run())


def test_kv_flows_while_the_rest_is_computed(way: Way) -> None:
    """Granted early, a piece goes with the layer that made it, and the copies before Commit are done when Commit comes."""

    async def run() -> None:
        async with rig(way) as (prefill, decode, address, _):
            decode.destination.expect("a")
            prefill.offer("a", address, 32)
            await prefill.diary.wait("granted", "a")
            prefill.compute("a", (0,), 0, 32)
            grants = decode.granted["a"][1]
            await eventually(decode.pools[0].caches[0][0][grants[0].blocks[0]].any)
            assert decode.diary.of("a") == ["offered"]
            for layer in LAYERS[1:]:
                prefill.compute("a", (layer,), 0, 32)
            prefill.source.commit("a", TOKENS)
            await prefill.diary.wait("handed over", "a")

    asyncio.run(run())


def test_a_prompt_computed_before_its_grant(way: Way) -> None:
    async def run() -> None:
        async with rig(way) as (prefill, decode, address, _):
            decode.holding = True
            decode.destination.expect("a")
            prefill.offer("a", address, 90)
            await decode.diary.wait("offered", "a")
            prefill.compute("a", LAYERS, 0, 80)
            await asyncio.sleep(0.05)
            assert decode.nearly_done_said == prefill.diary.of("a") == []
            prefill.compute("a", LAYERS, 80, 90)
            await eventually(lambda: decode.nearly_done_said == ["a"])
            prefill.source.commit("a", TOKENS)
            assert prefill.diary.of("a") == []
            decode.holding = False
            decode.grant_what_fits()
            await prefill.diary.wait("handed over", "a")
            assert decode.bytes["a"] == kv_bytes(90)

    asyncio.run(run())


def test_order_many_at_once(way: Way) -> None:
    async def run() -> None:
        async with rig(way, source_blocks=200, destination_blocks=200) as (prefill, decode, address, _):
            names = [f"t{i}" for i in range(30)]
            await asyncio.gather(*(hand_over(prefill, decode, address, name, 5 + 11 * (i % 9), 16) for i, name in enumerate(names)))
            assert [name for what, name in decode.diary.lines if what == "offered"] == names
            assert all(decode.diary.of(name) == ["offered", "committed"] for name in names)

    asyncio.run(run())


@pytest.mark.parametrize("who", ["source", "destination"])
@pytest.mark.parametrize("when", ["offered", "half computed", "computed", "committed"])
def test_abort_in_the_middle(way: Way, who: str, when: str) -> None:
    """The one who gives up and the other both learn it once, and the lane serves the next transfer."""

    async def run() -> None:
        async with rig(way) as (prefill, decode, address, _):
            decode.holding = when == "offered"
            decode.destination.expect("a")
            prefill.offer("a", address, 100)
            await decode.diary.wait("offered", "a")
            if when != "offered":
                await prefill.diary.wait("granted", "a")
                for layer in LAYERS[: 2 if when == "half computed" else None]:
                    prefill.compute("a", (layer,), 0, 100)
                await asyncio.sleep(0)
            if when == "committed":
                prefill.source.commit("a", TOKENS)
            if who == "source":
                prefill.source.cancel("a", "the client went away")
                assert prefill.diary.of("a")[-2:] == ["failed", "released"]
            else:
                decode.destination.cancel("a")
                assert decode.diary.of("a")[-1] in ("failed", "released")
            await prefill.diary.wait("released", "a")
            await decode.diary.wait("released", "a")
            assert isinstance(prefill.diary.errors["a"], Cancelled)
            assert isinstance(decode.diary.errors["a"], Cancelled)
            decode.holding = False
            await hand_over(prefill, decode, address, "b", 100)
            assert decode.diary.of("b") == ["offered", "committed"]

    asyncio.run(run())


@spread
def test_abort_in_the_middle_with_many_ranks(way: Way, here: Layout, there: Layout) -> None:
    """Blocks are overwritten as soon as they are released, so that a rank which copied on would be found in the next transfer."""

    async def run() -> None:
        async with rig(way, here=here, there=there, source_blocks=8, destination_blocks=8) as (prefill, decode, address, _):
            for number, cancel in enumerate((prefill.source.cancel, lambda name, _: decode.destination.cancel(name)) * 3):
                name = f"t{number}"
                decode.destination.expect(name)
                prefill.offer(name, address, 100)
                await prefill.diary.wait("granted", name)
                for layer in LAYERS[: 1 + number]:
                    prefill.compute(name, (layer,), 0, 100)
                await asyncio.sleep(0)
                cancel(name, "the client went away")
                await prefill.diary.wait("released", name)
                await decode.diary.wait("released", name)
                assert isinstance(prefill.diary.errors[name], Cancelled)
                assert isinstance(decode.diary.errors[name], Cancelled)
                await hand_over(prefill, decode, address, f"after {name}", 100)
                assert decode.diary.of(f"after {name}") == ["offered", "committed"]

    asyncio.run(run())


@pytest.mark.nightly  # a gloo pair whose other end goes while it connects takes 25 s to give up
@spread
def test_a_lane_between_many_ranks_that_breaks(way: Way, here: Layout, there: Layout) -> None:
    """Mappings and pairs of every rank go with it (the rig looks), and the next lane has its own."""

    async def run() -> None:
        async with rig(way, here=here, there=there) as (prefill, decode, address, exchange):
            for name in ("a", "b"):
                decode.destination.expect(name)
                prefill.offer(name, address, 100)
                await prefill.diary.wait("granted", name)
                prefill.compute(name, (0, 1), 0, 50)
                await asyncio.sleep(0)
                exchange.lanes[-1].cut()
                await prefill.diary.wait("released", name)
                await decode.diary.wait("released", name)
                await hand_over(prefill, decode, address, f"after {name}", 60)

    asyncio.run(run())


def test_a_lane_that_breaks_fails_its_transfers_and_the_next_one_dials_anew(way: Way) -> None:
    async def run() -> None:
        async with rig(way) as (prefill, decode, address, exchange):
            decode.destination.expect("a")
            prefill.offer("a", address, 100)
            await prefill.diary.wait("granted", "a")
            prefill.compute("a", (0, 1), 0, 50)
            await asyncio.sleep(0)
            exchange.lanes[0].cut()
            await prefill.diary.wait("released", "a")
            await decode.diary.wait("released", "a")
            assert isinstance(prefill.diary.errors["a"], TransferFailed)
            assert "reset" in prefill.diary.errors["a"].message
            await hand_over(prefill, decode, address, "b", 60)
            assert len(exchange.lanes) == 2

    asyncio.run(run())


def test_a_destination_that_is_not_there_and_then_is(way: Way) -> None:
    async def run() -> None:
        async with rig(way) as (prefill, decode, address, exchange):
            del exchange.destinations[address]
            prefill.offer("a", address, 10)
            await prefill.diary.wait("released", "a")
            assert "Nobody answers" in prefill.diary.errors["a"].message
            exchange.destinations[address] = decode.destination
            await hand_over(prefill, decode, address, "b", 10)

    asyncio.run(run())


def test_an_offer_before_its_decode_waits(way: Way) -> None:
    async def run() -> None:
        async with rig(way) as (prefill, decode, address, _):
            decode.destination.expect("behind it")
            prefill.offer("a", address, 20)
            prefill.offer("behind it", address, 20)
            await decode.diary.wait("offered", "behind it")
            assert decode.diary.of("a") == []
            decode.destination.expect("a")
            await prefill.compute_all("a")
            await prefill.diary.wait("handed over", "a")

    asyncio.run(run())


def test_an_offer_whose_decode_does_not_come_is_refused(way: Way) -> None:
    async def run() -> None:
        async with rig(way, offer_wait_s=0.2) as (prefill, decode, address, _):
            prefill.offer("b", address, 20)
            await prefill.diary.wait("released", "b")
            assert "No Decode" in prefill.diary.errors["b"].message
            decode.destination.expect("b")
            assert decode.diary.of("b") == ["failed", "released"]

    asyncio.run(run())


def test_a_refusal_is_told_in_its_words(way: Way) -> None:
    async def run() -> None:
        async with rig(way) as (prefill, decode, address, _):
            decode.holding = True
            decode.destination.expect("a")
            prefill.offer("a", address, 20)
            await decode.diary.wait("offered", "a")
            decode.destination.refuse("a", RefusedReason.DRAINING, "D is draining.")
            await prefill.diary.wait("released", "a")
            assert prefill.diary.errors["a"].message == decode.diary.errors["a"].message == "D is draining."

    asyncio.run(run())


def test_back_pressure(way: Way) -> None:
    """The destination holds one prompt at a time and the source three: KV waits in the source's blocks, then all arrives in order."""

    async def run() -> None:
        async with rig(way, source_blocks=24, destination_blocks=8) as (prefill, decode, address, _):
            names = [f"t{i}" for i in range(12)]
            for name in names:
                decode.destination.expect(name)

            async def feed() -> None:
                for name in names:
                    await prefill.offer_when_it_fits(name, address, 120)
                    await prefill.compute_all(name, 60)

            async with asyncio.timeout(60):
                await feed()
                for name in names:
                    await prefill.diary.wait("released", name)
            assert [name for what, name in decode.diary.lines if what == "committed"] == names

    asyncio.run(run())


def test_any_source_to_any_destination(way: Way) -> None:
    async def run() -> None:
        exchange = Exchange()
        async with AsyncExitStack() as stack:
            decodes = [await stack.enter_async_context(decode_end(way, exchange, True, LONG_S, worker_id=f"D{i}")) for i in range(2)]
            prefills = [await stack.enter_async_context(prefill_end(way, None, LONG_S, worker_id=f"P{i}")) for i in range(2)]
            pairs = [(prefill, decode, address) for prefill in prefills for decode, address in decodes] * 3
            work = (hand_over(*pair, f"t{i}", 30 + 7 * i) for i, pair in enumerate(pairs))
            await asyncio.gather(*work)

    asyncio.run(run())


def test_the_same_name_at_the_same_address_after_a_restart(way: Way) -> None:
    """A destination that restarts is another incarnation; the source has a broken lane and a stale mapping, and neither matters."""

    async def run() -> None:
        exchange = Exchange()
        async with prefill_end(way, exchange.dial, LONG_S) as prefill:
            for name in ("a", "b"):
                async with decode_end(way, exchange, False, LONG_S) as (decode, address):
                    await hand_over(prefill, decode, address, name, 50)
            prefill.offer("c", address, 10)
            await prefill.diary.wait("released", "c")
            assert isinstance(prefill.diary.errors["c"], TransferFailed)

    asyncio.run(run())


async def live_and_perhaps_die(prefill: PrefillEnd, decode: DecodeEnd, address: str, name: str, draw: random.Random, cut: Cut) -> None:
    await asyncio.sleep(draw.random() * 0.2)
    expect_first = draw.random() < 0.5
    if expect_first:
        decode.destination.expect(name)
    await prefill.offer_when_it_fits(name, address, draw.randint(1, 200))
    if not expect_first:
        decode.destination.expect(name)
    computing = asyncio.create_task(prefill.compute_all(name, draw.choice([8, 30, 64, 500])))
    await asyncio.sleep(draw.random() * 0.02)
    match draw.randrange(6):
        case 0:
            prefill.source.cancel(name, "random")
        case 1:
            decode.destination.cancel(name)
        case 2 if draw.random() < 0.2:
            cut()
    await computing
    await prefill.diary.wait("released", name)


async def interleaved(
    way: Way, seed: int, *, grpc: bool, here: Layout = LAYOUT, there: Layout = LAYOUT, count: int = 60
) -> tuple[int, int]:
    """`count` transfers through small pools: how many committed, how many did not."""
    draw = random.Random(seed)
    small = {"source_blocks": 48, "destination_blocks": 40}
    async with rig(way, grpc=grpc, here=here, there=there, **small) as (prefill, decode, address, exchange):
        names = [f"t{i}" for i in range(count)]

        def cut() -> None:
            if not grpc:
                exchange.lanes[-1].cut()

        async with asyncio.timeout(60):
            await asyncio.gather(*(live_and_perhaps_die(prefill, decode, address, name, draw, cut) for name in names))
        for name in names:
            assert prefill.diary.of(name).count("released") == 1
            assert prefill.diary.of(name).count("failed") + prefill.diary.of(name).count("handed over") == 1
        done = [name for what, name in decode.diary.lines if what == "committed"]
        return len(done), len(names) - len(done)


@pytest.mark.parametrize("grpc", [False, True])
def test_interleaved_transfers_cancelled_at_random_on_both_ends(way: Way, grpc: bool) -> None:
    """Each commits whole (the rig verifies every position) or fails on both sides; blocks change hands all the time."""
    outcomes = [asyncio.run(interleaved(way, seed, grpc=grpc)) for seed in range(2)]
    assert sum(done for done, _ in outcomes) > 2, "a cut takes with it all that waited for its pair to connect"
    assert sum(failed for _, failed in outcomes) > 2


@spread
def test_interleaved_transfers_of_many_ranks(way: Way, here: Layout, there: Layout) -> None:
    done, failed = asyncio.run(interleaved(way, 5, grpc=False, here=here, there=there, count=30))
    assert min(done, failed) > 2


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100, 140))
def test_interleaved_at_length(way: Way, seed: int) -> None:
    asyncio.run(interleaved(way, seed, grpc=seed % 2 == 0))


def test_what_is_stored_soon_after_an_announcement_is_announced_together(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Commit at the latest, which waits for nothing."""
    if way.transport.two_sided:
        pytest.skip("what a two-sided transport announces is bounded by its slots")
    monkeypatch.setattr("diptych.kv_transfer.source.ANNOUNCE_EVERY_S", 3600.0)

    async def run() -> None:
        async with rig(way) as (prefill, decode, address, _):
            decode.destination.expect("a")
            prefill.offer("a", address, 100)
            await prefill.diary.wait("granted", "a")
            prefill.source._announced_at = -3600.0
            pieces = []
            for layer in LAYERS:
                prefill.compute("a", (layer,), 0, 100)
                await asyncio.sleep(0)
                pieces.append(prefill.source._machine._transfers["a"].pieces)
            assert pieces == [1] * len(LAYERS), "the first at once, the others with the Commit"
            prefill.source.commit("a", TOKENS)
            await prefill.diary.wait("handed over", "a")
            await decode.diary.wait("committed", "a")

    asyncio.run(run())

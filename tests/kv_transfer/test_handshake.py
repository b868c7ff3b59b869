"""Two workers that cannot exchange KV say so by name, at both ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diptych.core.layout import DType
from diptych.core.transfer import PROTOCOL_VERSION, Hello, RefusedReason, Transport
from diptych.kv_transfer.actions import Connect, Send
from diptych.kv_transfer.faults import refusal
from kv_world import GLOO, GROUPS, LAYOUT, World, hello


@pytest.mark.parametrize(
    ("theirs", "reason", "words"),
    [
        (replace(hello("P", 1), protocol_version=1), RefusedReason.LAYOUT, f"protocol_version differs: {PROTOCOL_VERSION} here, 1 at P"),
        (hello("P", 1, replace(LAYOUT, block_size=32)), RefusedReason.LAYOUT, "block_size differs"),
        (hello("P", 1, replace(LAYOUT, fingerprint="other")), RefusedReason.LAYOUT, "fingerprint differs"),
        (
            hello("P", 1, replace(LAYOUT, groups=(replace(GROUPS[0], dtype=DType.FLOAT16), GROUPS[1]))),
            RefusedReason.LAYOUT,
            "groups.dtype differs: float32 here, float16 there",
        ),
        (hello("P", 1, transports=GLOO), RefusedReason.TRANSPORT, "P may use gloo"),
        (replace(hello("P", 1), shm=()), RefusedReason.TRANSPORT, "no transport in common"),
    ],
)
def test_a_difference_is_named(theirs: Hello, reason: RefusedReason, words: str) -> None:
    refused = refusal(hello("D", 2), theirs)
    assert refused is not None
    assert refused.reason is reason
    assert words in refused.message
    assert refused.transfer_id == ""


def test_pools_of_different_sizes_may_exchange() -> None:
    assert refusal(hello("D", 2), hello("P", 1, replace(LAYOUT, num_blocks=(7, 9)))) is None


def test_workers_of_different_kv_dtype_may_exchange() -> None:
    assert refusal(hello("D", 2), hello("P", 1, replace(LAYOUT, groups=(replace(GROUPS[0], dtype=DType.BFLOAT16), GROUPS[1])))) is None


def test_workers_of_different_block_size_may_exchange_what_has_no_window() -> None:
    full = replace(LAYOUT, groups=GROUPS[:1], num_blocks=(40,))
    assert refusal(hello("D", 2, full), hello("P", 1, replace(full, block_size=32))) is None


def test_one_pool_of_two_ranks_is_no_shared_memory() -> None:
    two = hello("P", 1, replace(LAYOUT, tp=2))
    refused = refusal(hello("D", 2), replace(two, shm=two.shm[:1]))
    assert refused is not None
    assert refused.reason is RefusedReason.TRANSPORT


def test_workers_of_different_parallelism_may_exchange() -> None:
    assert refusal(hello("D", 2), hello("P", 1, replace(LAYOUT, tp=2, stages=(2, 3)))) is None


def test_the_refusal_reaches_every_waiting_offer() -> None:
    world = World()
    world.source.machine._hello = hello("P", 1, replace(LAYOUT, block_size=32))
    world.expect("a/5")
    world.offer("a/5", 5)
    world.offer("b/5", 5)
    world.run_dry()
    assert world.source.told == {"a/5": ["failed", "released"], "b/5": ["failed", "released"]}
    assert world.source.machine.lanes == world.destination.machine.lanes == 0
    assert world.destination.told["a/5"] == [], "its router ends it"


def test_without_shared_memory_it_is_gloo_and_said_why() -> None:
    world = World((Transport.SHM, Transport.GLOO))
    world.expect("a/5")
    world.offer("a/5", 5)
    world.dial(world.dialling[0])
    world.deliver(world.wires[0], to_source=False)
    lane = world.destination.attaching[0]
    said, connect = world.destination.machine.not_attached(lane, "no shared memory", 0.0)
    assert isinstance(connect, Connect)
    assert connect.instead == "no shared memory"
    assert isinstance(said, Send)
    assert isinstance(said.message, Hello)
    assert said.message.transports == GLOO


def test_a_source_is_told_one_transport() -> None:
    world = World((Transport.SHM, Transport.GLOO))
    world.offer("a/5", 5)
    world.dial(world.dialling[0])
    world.at_source(world.source.machine.received(1, hello("D", 2, transports=(Transport.SHM, Transport.GLOO)), 0.0))
    assert world.source.told["a/5"] == ["failed", "released"]


def test_no_shared_memory_is_said() -> None:
    world = World()
    world.offer("a/5", 5)
    world.dial(world.dialling[0])
    world.deliver(world.wires[0], to_source=False)
    world.attach(world.destination.attaching[0], well=False)
    world.run_dry()
    assert world.source.told["a/5"] == ["failed", "released"]

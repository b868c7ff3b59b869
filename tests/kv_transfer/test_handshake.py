"""Two workers that cannot exchange KV say so by name, at both ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diptych.core.errors import ConfigError
from diptych.core.layout import DType
from diptych.core.transfer import PROTOCOL_VERSION, Hello, RefusedReason, Transport, transports_for
from diptych.kv_transfer.actions import Attach, Connect, Send
from diptych.kv_transfer.faults import refusal
from kv_world import GLOO, GROUPS, LAYOUT, World, hello


@pytest.mark.parametrize(
    ("theirs", "reason", "words"),
    [
        (replace(hello("P", 1), protocol_version=1), RefusedReason.LAYOUT, f"protocol_version differs: {PROTOCOL_VERSION} here, 1 at P"),
        (hello("P", 1, replace(LAYOUT, fingerprint="other")), RefusedReason.LAYOUT, "fingerprint differs"),
        (hello("P", 1, replace(LAYOUT, fingerprint="other")), RefusedReason.LAYOUT, "weights, settings (rope among them) or dtype are not"),
        (
            hello("P", 1, replace(LAYOUT, groups=(replace(GROUPS[0], head_dim=8), GROUPS[1]))),
            RefusedReason.LAYOUT,
            f"groups[0].head_dim differs: {GROUPS[0].head_dim} here, 8 there",
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


@pytest.mark.parametrize("dtype", DType)
def test_workers_of_different_kv_dtype_may_exchange(dtype: DType) -> None:
    assert refusal(hello("D", 2), hello("P", 1, replace(LAYOUT, groups=(replace(GROUPS[0], dtype=dtype), GROUPS[1])))) is None


def test_a_pool_on_a_gpu_and_one_in_host_memory_have_nothing_in_common() -> None:
    on_gpu, in_host = (transports_for((), on_gpu=on_gpu) for on_gpu in (True, False))
    refused = refusal(hello("D", 2, transports=in_host), hello("P", 1, transports=on_gpu))
    assert refused is not None
    assert refused.reason is RefusedReason.TRANSPORT
    assert "D may use shm, gloo and P may use cuda_ipc, nccl" in refused.message


@pytest.mark.parametrize(("on_gpu", "first", "then"), [(True, Transport.CUDA_IPC, Transport.NCCL), (False, Transport.SHM, Transport.GLOO)])
def test_the_best_is_tried_first_and_the_other_said_why(on_gpu: bool, first: Transport, then: Transport) -> None:
    both = transports_for((), on_gpu=on_gpu)
    world = World(both)
    world.expect("a/5")
    world.offer("a/5", 5)
    world.dial(world.dialling[0])
    attach = world.destination.machine.received(world.wires[0].destination_lane, world.wires[0].to_destination.popleft(), 0.0)
    assert [(action.transport) for action in attach if isinstance(action, Attach)] == [first]
    said, connect = world.destination.machine.not_attached(world.wires[0].destination_lane, "another host", 0.0)
    assert isinstance(connect, Connect)
    assert (connect.transport, connect.instead) == (then, "another host")
    assert isinstance(said, Send)
    assert isinstance(said.message, Hello)
    assert said.message.transports == (then,)


@pytest.mark.parametrize(("wanted", "on_gpu"), [(Transport.NCCL, False), (Transport.CUDA_IPC, False), (Transport.GLOO, True)])
def test_a_transport_that_the_pools_cannot_use_is_refused_by_name(wanted: Transport, on_gpu: bool) -> None:
    with pytest.raises(ConfigError, match=f"transfer.transports names {wanted}") as caught:
        transports_for((wanted,), on_gpu=on_gpu)
    assert caught.value.field == "transfer.transports"
    assert transports_for((wanted,), on_gpu=not on_gpu) == (wanted,)


def test_workers_of_different_block_size_may_exchange() -> None:
    assert refusal(hello("D", 2), hello("P", 1, replace(LAYOUT, block_size=32))) is None


def test_one_pool_of_two_ranks_is_no_shared_memory() -> None:
    two = hello("P", 1, replace(LAYOUT, tp=2))
    refused = refusal(hello("D", 2), replace(two, shm=two.shm[:1]))
    assert refused is not None
    assert refused.reason is RefusedReason.TRANSPORT


def test_workers_of_different_parallelism_may_exchange() -> None:
    assert refusal(hello("D", 2), hello("P", 1, replace(LAYOUT, tp=2, stages=(2, 3)))) is None


def test_the_refusal_reaches_every_waiting_offer() -> None:
    world = World()
    world.source.machine._hello = hello("P", 1, replace(LAYOUT, fingerprint="other"))
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

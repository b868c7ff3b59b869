"""One transfer between workers of several ranks: any parallelism to any, committed and fenced only with every rank."""

from __future__ import annotations

import random
from itertools import product

import pytest
from diptych.core.errors import Internal
from diptych.core.layout import even_stages
from diptych.core.transfer import Epoch, Ready, Refused, Transport
from diptych.kv_transfer.actions import Copy, HangUp, Send, TellReleased
from kv_world import GLOO, LAYERS, SHM, SLOTS, World, many

PARALLELISMS = list(product((1, 2, 4), (1, 2, 4)))
UNEVEN = {1: (), 2: (4, 1), 4: (1, 2, 1, 1)}
ID = "a/23"


def hand_over(world: World, transfer_id: str, cached_blocks: int, draw: random.Random) -> None:
    """Every rank stores its layers in its own time, before and after the grant. What is committed is looked at by the world."""
    tokens = world.tokens_of(transfer_id)
    world.expect(transfer_id)
    world.offer(transfer_id, tokens)
    world.compute(transfer_id, LAYERS[:2], 5, 0)
    world.run_dry()
    world.grant(transfer_id, cached_blocks)
    prompt = world.source.prompts[transfer_id]
    while unfinished := [key for key, stored in prompt.stored.items() if stored < tokens]:
        rank, layer = draw.choice(unfinished)
        world.compute(transfer_id, (layer,), draw.randint(1, 12), rank)
        world.announce()
        world.copy_step()
    world.commit(transfer_id)
    world.run_dry()
    world.check()
    assert world.destination.told[transfer_id] == ["offered", "committed"]
    assert world.source.told[transfer_id] == ["granted", "handed over", "released"]


@pytest.mark.parametrize(("there_tp", "there_pp"), PARALLELISMS)
@pytest.mark.parametrize(("tp", "pp"), PARALLELISMS)
def test_any_parallelism_to_any(tp: int, pp: int, there_tp: int, there_pp: int) -> None:
    for transports in (SHM, GLOO):
        world = World(transports, many(tp, UNEVEN[pp]), many(there_tp, even_stages(5, there_pp)))
        draw = random.Random(tp * pp)
        hand_over(world, "a/23", 2, draw)
        hand_over(world, "b/3", 0, draw)
        world.settle()


@pytest.mark.parametrize("transports", [SHM, GLOO], ids=["shm", "gloo"])
@pytest.mark.parametrize(("size", "size_there"), [(4, 8), (8, 4), (4, 6), (6, 4), (2, 16)])
def test_any_block_size_to_any(size: int, size_there: int, transports: tuple[Transport, ...]) -> None:
    world = World(transports, many(2, (2, 3), size), many(1, (1, 4), size_there))
    hand_over(world, "a/23", 1, random.Random(size))
    hand_over(world, "b/3", 0, random.Random(size))
    world.settle()


def granted(transports: tuple[Transport, ...] = SHM) -> World:
    """Two ranks hand to four; everything is stored and announced, and nothing has been copied."""
    world = World(transports, many(2, ()), many(2, (3, 2)))
    world.expect(ID)
    world.offer(ID, 23)
    world.run_dry()
    world.grant(ID)
    world.run_dry()
    world.compute(ID, LAYERS, 23)
    world.announce()
    return world


def deliver_all(world: World) -> None:
    while any(world.deliver(wire, to_source=to_source) for wire in world.wires for to_source in (True, False)):
        pass


def test_it_is_not_committed_before_the_last_rank_has_its_last_piece() -> None:
    world = granted()
    world.commit(ID)
    deliver_all(world)
    ranks = {world.routes[job.route].destination for jobs in world.destination.jobs for job in jobs if isinstance(job, Copy)}
    assert ranks == {0, 1, 2, 3}
    for rank in (0, 1, 3):
        while world._copy_step(rank):
            pass
    assert world.destination.told[ID] == ["offered"]
    while world._copy_step(2):
        assert world.destination.told[ID] == ["offered"] or not world.destination.jobs[2]
    assert world.destination.told[ID] == ["offered", "committed"]


def test_a_commit_that_leaves_a_hole_on_one_route_is_refused() -> None:
    """The last piece of the last route is lost, and the Commit counts as if it had never been."""
    world = granted()
    lost = world.wires[0].to_destination.pop()
    assert lost.route == len(world.routes) - 1
    world.source.machine._transfers[ID].pieces -= 1
    world.commit(ID)
    deliver_all(world)
    assert world.destination.told[ID] == ["offered", "failed"]


def test_blocks_return_only_when_every_rank_has_answered_the_fence() -> None:
    world = granted()
    deliver_all(world)
    world.cancel_at_destination(ID)
    machine = world.destination.machine
    for rank in (3, 1, 1, 0):
        assert machine.fenced(ID, world.now, rank) == []
    assert machine.leases == 1
    assert machine.fenced(ID, world.now, 2) == [TellReleased(ID)]


def test_the_source_keeps_its_blocks_until_every_rank_has_set_its_word() -> None:
    world = granted()
    world.cancel_at_source(ID)
    assert world.source.told[ID] == ["granted", "failed"]
    assert world.source.machine.transfers == 1
    world.fence_step()
    assert world.source.told[ID] == ["granted", "failed", "released"]
    assert world.source.machine.transfers == 0


def test_a_rank_that_was_fenced_late_counts_nothing() -> None:
    """Its sister's word is not its own: what it copies after the fence fails by the word of the rank it copied from."""
    world = granted()
    deliver_all(world)
    world.cancel_at_source(ID)
    world.fence_step()
    assert all(world.source.words[rank, slot] for rank in (0, 1) for slot in range(SLOTS) if world.source.words[0, slot])
    world.run_dry()
    assert world.destination.told[ID] == ["offered", "failed", "released"]


def test_a_lane_is_open_when_every_rank_is_attached() -> None:
    world = World(SHM, many(1, ()), many(2, (3, 2)))
    world.offer(ID, 23)
    world.dial(world.dialling[0])
    world.deliver(world.wires[0], to_source=False)
    lane = world.destination.attaching[0]
    for _ in range(3):
        world.attach(lane)
        assert not world.wires[0].to_source
    world.attach(lane)
    assert len(world.wires[0].to_source) == 1


def test_one_rank_that_cannot_attach_decides_for_all() -> None:
    world = World((Transport.SHM, Transport.GLOO), many(1, ()), many(2, ()))
    world.offer(ID, 23)
    world.dial(world.dialling[0])
    world.deliver(world.wires[0], to_source=False)
    lane = world.destination.attaching[0]
    world.attach(lane, well=False)
    assert [hello.transports for hello in world.wires[0].to_source] == [GLOO]
    world.attach(lane, well=False)
    assert len(world.wires[0].to_source) == 1, "the second refusal comes too late to say anything"


def test_a_piece_on_a_route_that_is_none_is_refused() -> None:
    world = granted()
    deliver_all(world)
    machine, lane = world.destination.machine, world.wires[0].destination_lane
    assert lane is not None
    receipt = machine._transfers[ID].receipt
    assert receipt is not None
    ready = Ready(ID, receipt.epoch, receipt._pieces, 0, (0,), 0, 23, (0, 1, 2, 3, 4, 5), route=len(world.routes))
    said = [action.message for action in machine.received(lane, ready, world.now) if isinstance(action, Send)]
    assert [type(message) for message in said] == [Refused]
    assert "there is no route" in said[0].message


def test_a_piece_of_another_rank_s_layers_is_refused() -> None:
    world = granted()
    deliver_all(world)
    machine, lane = world.destination.machine, world.wires[0].destination_lane
    assert lane is not None
    receipt = machine._transfers[ID].receipt
    assert receipt is not None
    number = next(number for number, route in enumerate(world.routes) if 4 not in route.groups[1].layers)
    ready = Ready(ID, receipt.epoch, receipt._pieces, 1, (4,), 12, 23, (3, 4, 5), route=number)
    said = [action.message for action in machine.received(lane, ready, world.now) if isinstance(action, Send)]
    assert "has no layers (4,)" in said[0].message


def test_over_gloo_such_a_piece_ends_the_lane() -> None:
    """Its size cannot be told, so what comes behind it could not be received either."""
    world = granted(GLOO)
    world.run_dry()
    machine, lane = world.destination.machine, world.wires[0].destination_lane
    assert lane is not None
    actions = machine.received(lane, Ready(ID, Epoch(2, 9), 0, 0, (0,), 0, 4, (), route=9), world.now)
    assert any(isinstance(action, HangUp) for action in actions)


def test_a_prompt_is_committed_only_when_every_rank_has_stored_it() -> None:
    world = granted()
    world.offer("b/7", 7)
    world.compute("b/7", LAYERS, 7, 0)
    with pytest.raises(Internal):
        world.source.machine.commit("b/7", (), world.now)
    world.compute("b/7", LAYERS, 7, 1)
    world.source.machine.commit("b/7", (), world.now)

"""DESIGN's table of waits, row by row: each has an owner and an end, and nothing is left at the end."""

from __future__ import annotations

import pytest
from diptych.core.errors import Cancelled, Internal, InvalidRequest, TransferFailed
from diptych.core.transfer import (
    Ack,
    Cancel,
    Commit,
    Epoch,
    Grant,
    GroupGrant,
    KeepAlive,
    NearlyDone,
    Offer,
    Ready,
    Refused,
    RefusedReason,
)
from diptych.kv_transfer.actions import Fence, HangUp, Send, TellFailed, TellOffered, TellReleased
from diptych.kv_transfer.source_machine import HANDSHAKE_S as DIAL_S
from kv_world import FIRST_TOKENS, LAYERS, LEASE_S, OFFER_WAIT_S, World, hello

ID = "a/10"


def connected() -> World:
    """A world whose lane is open: one transfer has been made on it."""
    world = World()
    hand_over(world, "0/1")
    return world


def hand_over(world: World, transfer_id: str) -> None:
    world.expect(transfer_id)
    begin(world, transfer_id)
    world.grant(transfer_id)
    finish(world, transfer_id)
    world.run_dry()
    assert world.destination.told[transfer_id] == ["offered", "committed"]
    assert world.source.told[transfer_id] == ["granted", "handed over", "released"]


def begin(world: World, transfer_id: str = ID) -> None:
    world.offer(transfer_id, world.tokens_of(transfer_id))
    world.run_dry()


def granted(world: World, transfer_id: str = ID) -> None:
    world.expect(transfer_id)
    begin(world, transfer_id)
    world.grant(transfer_id)
    world.run_dry()


def finish(world: World, transfer_id: str = ID) -> None:
    world.compute(transfer_id, LAYERS, 1000)
    world.commit(transfer_id)


def messages(actions: list[object]) -> list[object]:
    return [action.message for action in actions if isinstance(action, Send)]


def error_of(actions: list[object]) -> Exception:
    return next(action.error for action in actions if isinstance(action, TellFailed))


# -- the source waits -------------------------------------------------------------------------------------------------


def test_a_lane_that_nobody_answers_is_given_up() -> None:
    world = World()
    world.offer(ID, 10)
    assert world.source.machine.next_deadline() == DIAL_S
    actions = world.source.machine.expire(DIAL_S)
    assert [type(action) for action in actions] == [HangUp, TellFailed, Fence]
    assert f"No Hello came within {DIAL_S:g} s" in error_of(actions).message


def test_an_offer_waits_for_its_grant_without_end_and_holds_the_blocks() -> None:
    world = connected()
    world.expect(ID)
    begin(world)
    world.advance(10_000)
    assert world.source.machine.next_deadline() is None
    assert world.source.told[ID] == []
    world.cancel_at_source(ID)
    world.run_dry()
    assert world.source.told[ID] == world.destination.told[ID][1:] == ["failed", "released"]


def test_a_commit_without_ack_ends_after_one_lease() -> None:
    world = connected()
    granted(world)
    finish(world)
    world.advance(LEASE_S - 0.1)
    assert world.source.told[ID] == ["granted"]
    world.advance(0.1)
    assert world.source.told[ID] == ["granted", "failed", "released"]
    assert world.source.machine.lanes == 0, "a destination that says nothing for a lease loses its lane"
    world.run_dry()
    assert world.destination.told[ID][-2:] == ["failed", "released"]
    hand_over(world, "b/10")


def test_a_destination_that_still_speaks_keeps_its_lane_when_an_ack_is_late() -> None:
    world = connected()
    granted(world)
    finish(world)
    world.advance(LEASE_S / 2)
    world.at_source(world.source.machine.received(1, Refused("other", RefusedReason.CLOSED, ""), world.now))
    actions = world.source.machine.expire(LEASE_S)
    assert [type(action) for action in actions] == [Send, TellFailed, Fence]
    assert isinstance(messages(actions)[0], Cancel)
    assert world.source.machine.lanes == 1


def test_the_source_keeps_its_grants_alive_and_only_those() -> None:
    world = connected()
    granted(world)
    granted(world, "b/5")
    finish(world, "b/5")
    world.expect("c/5")
    begin(world, "c/5")
    for _ in range(10):
        world.advance(LEASE_S / 3)
        kept = [message for message in world.wires[0].to_destination if isinstance(message, KeepAlive)]
        assert [set(message.transfer_ids) for message in kept] in ([{ID}], [])
        world.run_dry()
    assert world.destination.told[ID] == ["offered"]
    hand_over_rest(world)


def hand_over_rest(world: World) -> None:
    finish(world)
    world.run_dry()
    assert world.source.told[ID][-2:] == ["handed over", "released"]
    world.cancel_at_destination("c/5")
    world.run_dry()
    world.advance(LEASE_S)
    assert world.source.machine.next_deadline() is None, "with no grant nothing is kept alive"


# -- the destination waits --------------------------------------------------------------------------------------------


def test_a_decode_without_offer_waits_for_its_router() -> None:
    world = World()
    world.expect(ID)
    assert world.destination.machine.next_deadline() is None
    world.cancel_at_destination(ID)
    assert world.destination.told[ID] == ["failed", "released"]
    begin(world)
    assert world.source.told[ID] == ["failed", "released"], "its Offer comes too late"


def test_an_offer_without_decode_is_parked_and_then_refused() -> None:
    world = connected()
    begin(world)
    assert world.destination.machine.parked == 1
    assert world.destination.machine.next_deadline() == OFFER_WAIT_S
    world.advance(OFFER_WAIT_S)
    world.run_dry()
    assert world.source.told[ID] == ["failed", "released"]
    world.expect(ID)
    assert world.destination.told[ID] == ["failed", "released"], "a Decode that comes still later"


def test_a_parked_offer_is_taken_up() -> None:
    world = connected()
    begin(world)
    world.advance(OFFER_WAIT_S - 0.1)
    world.expect(ID)
    assert world.destination.told[ID] == ["offered"]
    assert world.destination.machine.next_deadline() is None


def test_a_prompt_that_is_nearly_done_says_so_once_while_it_waits_for_its_grant() -> None:
    world = connected()
    world.expect(ID)
    begin(world)
    world.compute(ID, LAYERS, 9)
    world.announce()
    assert not world.wires[0].to_destination, "a position is not even begun"
    for layer in LAYERS:
        world.compute(ID, (layer,), 1)
        world.announce()
    assert list(world.wires[0].to_destination) == [NearlyDone(ID)]
    world.run_dry()
    assert world.destination.nearly_done == {ID}
    world.grant(ID)
    world.commit(ID)
    world.run_dry()
    assert world.destination.told[ID] == ["offered", "committed"]


def test_a_prompt_granted_before_it_is_nearly_done_does_not_say_so() -> None:
    world = connected()
    granted(world)
    finish(world)
    assert not any(isinstance(message, NearlyDone) for message in world.wires[0].to_destination)


@pytest.mark.parametrize("parked", [False, True])
def test_a_prompt_that_is_nearly_done_before_its_lane_opens_or_its_decode_comes_is_known_to_be(parked: bool) -> None:
    world = connected() if parked else World()
    world.offer(ID, 10)
    world.compute(ID, LAYERS, 10)
    world.announce()
    if not parked:
        world.expect(ID)
    world.run_dry()
    if parked:
        world.expect(ID)
    assert world.destination.nearly_done == {ID}


def test_nearly_done_from_another_lane_is_not_heard() -> None:
    world = connected()
    machine = world.destination.machine
    world.expect(ID)
    begin(world)
    stranger = machine.lane_opened(0.0)
    world.destination.mapped[stranger, 0] = world.source
    machine.received(stranger, hello("Q", 9), 0.0)
    machine.attached(stranger, 0.0)
    machine.received(stranger, Offer("b/10", 10), 0.0)
    assert machine.received(stranger, NearlyDone(ID), 0.0) == []
    machine.received(1, NearlyDone("b/10"), 0.0)
    assert [type(action) for action in machine.expect("b/10", 0.0)] == [TellOffered]


def test_parking_is_bounded() -> None:
    world = connected()
    for number in range(5000):
        world.destination.machine.received(1, Offer(f"{number}", 5), 0.0)
    refused = world.destination.machine.received(1, Offer("one more", 5), 0.0)
    assert world.destination.machine.parked == 4096
    assert messages(refused)[0].reason is RefusedReason.UNKNOWN


def test_a_grant_without_news_ends_with_its_lease() -> None:
    world = connected()
    granted(world)
    world.compute(ID, (0,), 5)
    world.announce()
    world.now = 4.0
    world.run_dry()  # a piece renews the lease
    assert world.destination.machine.next_deadline() == 4.0 + LEASE_S
    actions = world.destination.machine.expire(4.0 + LEASE_S)
    assert isinstance(actions[0], HangUp), "a source that says nothing for a lease loses its lane"
    assert TellReleased(ID) not in actions, "not before the fence"
    assert Fence(ID, lane=1) in actions


def test_a_source_that_still_speaks_keeps_its_lane_when_one_lease_ends() -> None:
    world = connected()
    granted(world)
    actions = world.destination.machine.received(1, KeepAlive(()), LEASE_S / 2)
    actions = world.destination.machine.expire(LEASE_S)
    assert [type(action) for action in actions] == [Send, TellFailed, Fence]
    assert messages(actions)[0].reason is RefusedReason.FAILED


def test_after_commit_the_destination_waits_only_for_its_own_copies() -> None:
    world = connected()
    granted(world)
    finish(world)
    while world.deliver(world.wires[0], to_source=False):
        pass
    assert world.destination.machine.next_deadline() is None
    world.run_dry()
    assert world.destination.told[ID] == ["offered", "committed"]


def test_a_lane_that_never_says_hello_is_closed() -> None:
    machine = World().destination.machine
    lane = machine.lane_opened(0.0)
    due = machine.next_deadline()
    assert due is not None
    actions = machine.expire(due)
    assert isinstance(messages(actions)[0], Refused)
    assert isinstance(actions[1], HangUp)
    assert machine.received(lane, hello("P", 1), due) == [], "no message after close has effect"


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_piece_of_another_epoch_is_not_looked_at() -> None:
    world = connected()
    granted(world)
    finish(world)
    wire = world.wires[0]
    stale = [
        Ready(ID, Epoch(2, 1), m.seq, m.group, m.layers, m.start, m.stop, m.blocks, m.slot, m.word) if isinstance(m, Ready) else m
        for m in wire.to_destination
    ]
    wire.to_destination.clear()
    for message in stale:
        if isinstance(message, Ready):
            assert world.destination.machine.received(1, message, 0.0) == []
        else:
            world.at_destination(world.destination.machine.received(1, message, 0.0))
    world.run_dry()
    assert world.destination.told[ID] == ["offered", "failed", "released"]
    assert world.source.told[ID] == ["granted", "failed", "released"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"seq": 1}, "piece 0 was due"),
        ({"group": 2}, "cache group 2 has no layers"),
        ({"layers": (1,)}, "has no layers"),
        ({"layers": ()}, "has no layers"),
        ({"layers": (0, 0)}, "repeat"),
        ({"start": 4, "blocks": (1, 2)}, "stands at 0"),
        ({"stop": 12}, "not within 10"),
        ({"stop": 0, "blocks": ()}, "no positions"),
        ({"blocks": (0, 1)}, "do not hold"),
        ({"blocks": (0, 1, 99)}, "outside"),
        ({"slot": 6}, "no epoch word"),
    ],
)
def test_a_wrong_piece_fails_its_transfer(change: dict[str, object], why: str) -> None:
    world = connected()
    granted(world)
    fields = {"seq": 0, "group": 0, "layers": (0,), "start": 0, "stop": 10, "blocks": (0, 1, 2), "slot": 0, "word": 0} | change
    actions = world.destination.machine.received(1, Ready(transfer_id=ID, epoch=Epoch(2, 2), **fields), 0.0)
    assert why in error_of(actions).message
    assert messages(actions)[0].reason is RefusedReason.FAILED
    world.destination.machine.check()


def test_a_commit_with_holes_fails_its_transfer() -> None:
    world = connected()
    granted(world)
    actions = world.destination.machine.received(1, Commit(ID, 0, FIRST_TOKENS), 0.0)
    assert "leave holes" in error_of(actions).message


@pytest.mark.parametrize(
    "groups",
    [
        (),
        (GroupGrant(0, (1, 2, 3)),),
        (GroupGrant(0, (1, 2)), GroupGrant(0, (1, 2, 3))),
        (GroupGrant(2, (1, 2)), GroupGrant(0, (1, 2, 3))),
        (GroupGrant(12, ()), GroupGrant(0, (1, 2, 3))),
        (GroupGrant(0, (1, 2, 2)), GroupGrant(0, (1, 2, 3))),
        (GroupGrant(0, (1, 2, 40)), GroupGrant(0, (1, 2, 3))),
    ],
)
def test_a_wrong_grant_is_refused_at_both_ends(groups: tuple[GroupGrant, ...]) -> None:
    world = connected()
    world.expect(ID)
    begin(world)
    with pytest.raises(Internal):
        world.destination.machine.grant(ID, groups, 0.0)
    actions = world.source.machine.received(1, Grant(ID, Epoch(2, 9), groups), 0.0)
    assert "Grant is wrong" in error_of(actions).message
    assert isinstance(messages(actions)[0], Cancel)


def test_a_grant_of_what_the_source_no_longer_holds() -> None:
    world = connected()
    world.expect("a/30")
    world.offer("a/30", 30)
    prompt = world.source.prompts["a/30"]
    prompt.tables = ((-1, -1, *prompt.tables[0][2:]), prompt.tables[1])
    world.source.machine.computed("a/30", LAYERS, 0, 30, prompt.tables)
    world.run_dry()
    blocks = tuple(range(8))
    actions = world.source.machine.received(1, Grant("a/30", Epoch(2, 9), (GroupGrant(0, blocks), GroupGrant(0, blocks))), 0.0)
    assert "does not hold" in error_of(actions).message


def test_a_grant_for_nobody_is_answered_with_cancel() -> None:
    world = connected()
    actions = world.source.machine.received(1, Grant("nobody", Epoch(2, 9), ()), 0.0)
    assert messages(actions) == [Cancel("nobody", "The source has ended this transfer.")]


def test_an_id_lives_once() -> None:
    world = connected()
    granted(world)
    with pytest.raises(InvalidRequest):
        world.source.machine.offer(ID, "D:1", 10, 0.0)
    with pytest.raises(InvalidRequest):
        world.destination.machine.expect(ID, 0.0)
    again = world.destination.machine.received(1, Offer(ID, 10), 0.0)
    assert messages(again)[0].reason is RefusedReason.CLOSED
    for actions in (world.source.machine.offer("0/1", "D:1", 1, 0.0), world.destination.machine.expect("0/1", 0.0)):
        assert [type(action) for action in actions] == [TellFailed, TellReleased]
        assert isinstance(error_of(actions), TransferFailed)
    late = world.destination.machine.received(1, Offer("0/1", 10), 59.0)
    assert messages(late)[0].reason is RefusedReason.CLOSED
    assert world.destination.machine.received(1, Offer("0/1", 10), 61.0) == [], "forgotten after a minute, so parked as any other"


def test_slots_bound_the_transfers_of_a_source() -> None:
    world = connected()
    for number in range(6):
        world.offer(f"{number + 1}/2", 2)
    world.offer("7/2", 2)
    assert world.source.told["7/2"] == ["failed", "released"]
    world.cancel_at_source("1/2")
    world.offer("8/2", 2)
    assert world.source.told["8/2"] == []


@pytest.mark.parametrize("message", [hello("D", 2), Offer("x", 1), Commit("x", 0, ()), KeepAlive(())])
def test_a_source_hangs_up_on_what_a_destination_does_not_say(message: object) -> None:
    world = connected()
    granted(world)
    actions = world.source.machine.received(1, message, 0.0)
    assert isinstance(actions[0], HangUp)
    assert isinstance(error_of(actions), TransferFailed)


@pytest.mark.parametrize("message", [hello("P", 1), Grant("x", Epoch(1, 1), ()), Ack("x", 0, 0.0), Refused("x", RefusedReason.FAILED, "")])
def test_a_destination_hangs_up_on_what_a_source_does_not_say(message: object) -> None:
    world = connected()
    granted(world)
    actions = world.destination.machine.received(1, message, 0.0)
    assert isinstance(actions[0], HangUp)
    assert isinstance(error_of(actions), TransferFailed)


def test_an_early_ack_fails_the_transfer() -> None:
    world = connected()
    granted(world)
    actions = world.source.machine.received(1, Ack(ID, 0, 0.0), 0.0)
    assert "not committed" in error_of(actions).message


def test_computed_out_of_order_and_commit_too_early_are_defects() -> None:
    world = connected()
    granted(world)
    with pytest.raises(Internal):
        world.source.machine.computed(ID, (0,), 4, 8, ())
    with pytest.raises(Internal):
        world.source.machine.commit(ID, FIRST_TOKENS, 0.0)
    with pytest.raises(Internal):
        world.destination.machine.grant(ID, (), 0.0)


def test_a_source_that_dials_again_ends_its_old_lane() -> None:
    """Its old one is dead without our knowing: a restart behind a network that swallowed the news."""
    world = connected()
    granted(world)
    machine = world.destination.machine
    lane = machine.lane_opened(0.0)
    actions = machine.received(lane, hello("P", 77), 0.0)
    assert isinstance(actions[0], HangUp)
    assert actions[0].lane == 1
    assert Fence(ID, lane=1) in actions
    machine.check()


def test_close_leaves_nothing() -> None:
    world = connected()
    granted(world)
    world.expect("b/3")
    source, destination = world.source.machine.close("down", 0.0), world.destination.machine.close("down", 0.0)
    assert isinstance(error_of(source), Cancelled)
    assert world.source.machine.lanes == world.destination.machine.lanes == 0
    world.at_source(source)
    assert world.source.machine.transfers == 0
    assert [action.transfer_id for action in destination if isinstance(action, TellReleased)] == ["b/3"]

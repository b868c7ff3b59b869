"""Both machines joined by a wire, in any order of events: DESIGN §3's promises hold whatever happens when."""

from __future__ import annotations

import random

import pytest
from diptych.core.transfer import Transport
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kv_world import GLOO, GROUPS, LAYERS, LAYOUT, SHM, World, many

INDEX = st.integers(0, 7)


class Hinge(RuleBasedStateMachine):
    """Rules choose among what there is by index; indices wrap."""

    transports = SHM
    here = there = LAYOUT

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.transports, self.here, self.there)
        self.ids: list[str] = []

    def new_id(self, tokens: int) -> str:
        self.ids.append(f"{len(self.ids)}/{tokens}")
        return self.ids[-1]

    @rule(tokens=st.integers(1, 40), order=st.sampled_from(["expect first", "offer first", "only offer", "only expect"]))
    def begin(self, tokens: int, order: str) -> None:
        transfer_id = self.new_id(tokens)
        if order in ("expect first", "only expect"):
            self.world.expect(transfer_id)
        if order != "only expect":
            self.world.offer(transfer_id, tokens)
        if order == "offer first":
            self.world.expect(transfer_id)

    @precondition(lambda self: self.ids)
    @rule(index=INDEX)
    def repeat_or_come_late(self, index: int) -> None:
        transfer_id = self.ids[-1 - index % len(self.ids)]
        if transfer_id not in self.world.source.told:
            self.world.offer(transfer_id, self.world.tokens_of(transfer_id))
        elif transfer_id not in self.world.destination.told:
            self.world.expect(transfer_id)
        elif transfer_id not in self.world.source.prompts:
            before = self.world.source.told.pop(transfer_id)
            self.world.offer(transfer_id, self.world.tokens_of(transfer_id))
            if transfer_id not in self.world.source.prompts:
                assert self.world.source.told.get(transfer_id) in (None, ["failed", "released"])
                self.world.source.told[transfer_id] = before

    @precondition(lambda self: self.world.source.prompts)
    @rule(index=INDEX, layer=st.sampled_from(LAYERS), all_layers=st.booleans(), count=st.integers(1, 20), tell=st.booleans())
    def compute(self, index: int, layer: int, all_layers: bool, count: int, tell: bool) -> None:
        self.world.compute(self.pick(self.world.source.prompts, index), LAYERS if all_layers else (layer,), count)
        if tell:
            self.world.announce()

    @precondition(lambda self: self.world.source.prompts and self.world.here.ranks > 1)
    @rule(index=INDEX, rank=st.integers(0, 7), count=st.integers(1, 20))
    def compute_on_one_rank(self, index: int, rank: int, count: int) -> None:
        self.world.compute(self.pick(self.world.source.prompts, index), LAYERS, count, rank % self.world.here.ranks)
        self.world.announce()

    @precondition(lambda self: self.world.source.fences)
    @rule(count=st.integers(1, 3))
    def fence(self, count: int) -> None:
        for _ in range(count):
            self.world.fence_step()

    @precondition(lambda self: self.world.source.prompts)
    @rule(index=INDEX)
    def finish(self, index: int) -> None:
        transfer_id = self.pick(self.world.source.prompts, index)
        for rank, layer in self.world.source.prompts[transfer_id].stored:
            self.world.compute(transfer_id, (layer,), 1000, rank)
        self.world.commit(transfer_id)

    @precondition(lambda self: self.world.destination.waiting)
    @rule(index=INDEX, cached=st.integers(0, 3))
    def grant(self, index: int, cached: int) -> None:
        self.world.grant(self.pick(self.world.destination.waiting, index), cached)

    @precondition(lambda self: self.world.destination.waiting)
    @rule(index=INDEX)
    def refuse(self, index: int) -> None:
        self.world.refuse(self.pick(self.world.destination.waiting, index))

    @precondition(lambda self: self.ids)
    @rule(index=INDEX, at_source=st.booleans())
    def cancel(self, index: int, at_source: bool) -> None:
        transfer_id = self.ids[-1 - index % len(self.ids)]
        if at_source:
            self.world.cancel_at_source(transfer_id)
        else:
            self.world.cancel_at_destination(transfer_id)

    @precondition(lambda self: self.world.dialling)
    @rule(well=st.integers(0, 9))
    def dial(self, well: int) -> None:
        self.world.dial(self.world.dialling[0], well=well > 0)

    @precondition(lambda self: self.world.destination.attaching)
    @rule(well=st.integers(0, 9))
    def attach(self, well: int) -> None:
        self.world.attach(self.world.destination.attaching[0], well=well > 0)

    @precondition(lambda self: self.world.wires)
    @rule(to_source=st.booleans(), count=st.integers(1, 4), index=st.integers(0, 2))
    def deliver(self, to_source: bool, count: int, index: int) -> None:
        wire = self.world.wires[-1 - index % len(self.world.wires)]
        for _ in range(count):
            self.world.deliver(wire, to_source=to_source)

    @rule(count=st.integers(1, 5))
    def copy(self, count: int) -> None:
        for _ in range(count):
            self.world.copy_step()

    @precondition(lambda self: self.world.source.connecting)
    @rule()
    def connect(self) -> None:
        self.world.connect()

    @precondition(lambda self: any(self.world.source.staging.values()))
    @rule(count=st.integers(1, 3))
    def stage(self, count: int) -> None:
        for _ in range(count):
            self.world.stage_step()

    @precondition(lambda self: any(posted for wire in self.world.wires for posted in wire.pair.values()))
    @rule(count=st.integers(1, 3))
    def receive(self, count: int) -> None:
        for _ in range(count):
            self.world.receive_step(self.world.wires[-1])

    @precondition(lambda self: self.world.wires and self.world.transports == GLOO)
    @rule(source_first=st.booleans(), really=st.integers(0, 4))
    def break_pair(self, source_first: bool, really: int) -> None:
        if not really:
            self.world.break_pair(self.world.wires[-1], source_first=source_first)

    @rule()
    def all_goes_on(self) -> None:
        self.world.announce()
        self.world.run_dry()
        self.world.check_nearly_done()

    @precondition(lambda self: self.world.wires)
    @rule(lose=st.booleans())
    def cut(self, lose: bool) -> None:
        self.world.cut(self.world.wires[-1], lose=lose)

    @rule(seconds=st.sampled_from([0.1, 2.0, 3.5, 6.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule(which=st.integers(0, 9))
    def restart(self, which: int) -> None:
        if which == 0:
            self.world.restart_source()
        elif which == 1:
            self.world.restart_destination()

    @invariant()
    def holds(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.settle()

    @staticmethod
    def pick(among: dict[str, object], index: int) -> str:
        return list(among)[index % len(among)]


class TwoSided(Hinge):
    transports = GLOO


class ManyRanks(Hinge):
    """A head that two ranks of the source hold, three stages to two."""

    here, there = many(4, (2, 1, 2)), many(1, (1, 4))


class ManyRanksTwoSided(ManyRanks):
    transports = GLOO
    here, there = many(2, (3, 2)), many(4, ())


TestHinge = Hinge.TestCase
TestTwoSided = TwoSided.TestCase
TestManyRanks = ManyRanks.TestCase
TestManyRanksTwoSided = ManyRanksTwoSided.TestCase
TestHinge.settings = TestTwoSided.settings = settings(
    max_examples=120, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestManyRanks.settings = TestManyRanksTwoSided.settings = settings(
    max_examples=40, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


def drive(world: World, draw: random.Random, steps: int) -> None:
    """A busy hour: mostly progress, now and then a calamity."""
    rules = Hinge()
    rules.world = world
    for _ in range(steps):
        chance = draw.random()
        if chance < 0.12:
            rules.begin(draw.randint(1, 40), draw.choice(["expect first", "offer first", "offer first", "only offer", "only expect"]))
        elif chance < 0.32 and world.source.prompts:
            layers = draw.random() < 0.3
            if world.here.ranks > 1 and draw.random() < 0.5:
                rules.compute_on_one_rank(draw.randrange(8), draw.randrange(8), draw.randint(1, 20))
            else:
                rules.compute(draw.randrange(8), draw.choice(LAYERS), layers, draw.randint(1, 20), draw.random() < 0.5)
        elif chance < 0.40 and world.source.prompts:
            rules.finish(draw.randrange(8))
        elif chance < 0.50 and world.destination.waiting:
            rules.grant(draw.randrange(8), draw.randrange(3))
        elif chance < 0.52 and rules.ids:
            rules.cancel(draw.randrange(8), draw.random() < 0.5)
        elif chance < 0.56 and rules.ids:
            rules.repeat_or_come_late(draw.randrange(8))
        elif chance < 0.60 and world.dialling:
            rules.dial(draw.randrange(10))
        elif chance < 0.64 and world.destination.attaching:
            rules.attach(draw.randrange(10))
        elif chance < 0.82 and world.wires:
            rules.deliver(draw.random() < 0.5, draw.randint(1, 4), 0)
        elif chance < 0.96:
            rules.copy(draw.randint(1, 5))
            world.fence_step()
            if world.source.connecting:
                world.connect()
            if draw.random() < 0.5:
                rules.stage(draw.randint(1, 3))
            if world.wires and draw.random() < 0.5:
                rules.receive(draw.randint(1, 3))
        elif chance < 0.985:
            world.advance(draw.choice([0.1, 0.5, 2.0, 6.0]))
        elif chance < 0.986 and world.wires and world.transports == GLOO:
            world.break_pair(world.wires[-1], source_first=draw.random() < 0.5)
        elif chance < 0.987 and world.wires:
            rules.cut(draw.random() < 0.5)
        elif chance < 0.988:
            rules.restart(draw.randrange(2))
        world.check()


@pytest.mark.parametrize("transports", [SHM, GLOO], ids=["shm", "gloo"])
def test_busy_hours_of_many_ranks(transports: tuple[Transport, ...]) -> None:
    committed = failed = 0
    for seed in range(20):
        world = World(transports, many(4, (2, 1, 2)), many(1, (1, 4)))
        drive(world, random.Random(seed), 400)
        world.settle()
        committed += len(world.committed)
        failed += sum("failed" in told for told in world.destination.told.values())
    assert committed > 5
    assert failed > 5


@pytest.mark.parametrize("transports", [SHM, GLOO], ids=["shm", "gloo"])
def test_busy_hours_commit_and_fail(transports: tuple[Transport, ...]) -> None:
    """What is explored is not only failure, nor only success."""
    committed = failed = cancelled_late = 0
    for seed in range(100):
        world = World(transports)
        drive(world, random.Random(seed), 400)
        world.settle()
        committed += len(world.committed)
        failed += sum("failed" in told for told in world.destination.told.values())
        cancelled_late += sum(told == ["granted", "failed", "released"] for told in world.source.told.values())
    assert committed > 40
    assert failed > 40
    assert cancelled_late > 40


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_a_busy_day(seed: int) -> None:
    world = World(GLOO if seed % 2 else SHM)
    drive(world, random.Random(seed), 3000)
    world.settle()


def test_groups_are_of_both_kinds() -> None:
    assert {group.kind.value for group in GROUPS} == {"full", "window"}

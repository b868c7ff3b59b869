"""Nobody waits for ever, however full the pools: DESIGN §2's order of memory under loads that fill both sides.

The bounds. A prompt at P is passed by at most 16 later ones for the same D; an Offer at D by at most 16 later ones; KV that one D has
not granted fills at most half of P's pool. While anything waits, something is computed or on its way. So an Offer waits for those who
had D's memory or stood in front of it, and for 16 more at most, whatever comes after: in steps of D, at most twice the work of all
these one after another (once, and once more for what preemption throws away). `cluster_world` checks all of it throughout.
"""

from __future__ import annotations

import gc
from collections import Counter
from random import Random
from types import BuiltinFunctionType, FunctionType, ModuleType

import pytest
from cluster_world import CONTEXT, Costs, Life, World
from diptych.core.request import Request
from diptych.decode_worker.admission import MAX_PASSES
from fake_engine import request
from hypothesis import given, settings
from hypothesis import strategies as st


def prompt(random: Random, length: int) -> list[int]:
    """A third of the prompts begin alike, so that some of them are cached, by one side or both."""
    family = random.randrange(3)
    alike = [1 + (family * 7 + i * i) % 38 for i in range(length // 2 if random.random() < 0.5 else 1)]
    return alike + [random.randrange(1, 39) for _ in range(length - len(alike))]


def some_request(random: Random) -> Request:
    length = random.choice([random.randint(1, 30), random.randint(30, 90), random.randint(90, 140)])
    most = random.randint(1, min(CONTEXT - length - 1, 60))
    return request(prompt(random, length), max_tokens=most, ignore_eos=random.random() < 0.5, n=random.choice([1, 1, 1, 1, 3]))


def keep_busy(world: World, random: Random, *, at_once: int, asked: int, local: float = 0.0, leave: float = 0.0) -> None:
    """`asked` requests, `at_once` of them in the cluster at any time: who ends is followed by the next. `local`, `leave`: shares of them
    whose prompt D reads itself, and whose client goes away."""
    left = [asked]

    def ask(_: Life | None = None) -> None:
        if left[0]:
            left[0] -= 1
            here = None if random.random() < local else random.randrange(len(world.prefills))
            life = world.ask(some_request(random), prefill=here, decode=random.randrange(len(world.decodes)))
            if random.random() < leave:
                world.after(random.choice([0.01, 0.1, 1.0, 3.0]), lambda: world.leave(life))

    world.ended = ask
    for _ in range(at_once):
        ask()


def counter(world: World, name: str) -> float:
    return sum(dict(worker.scheduler.counters)[f"diptych_worker_{name}_total"] for worker in world.decodes)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1, 1), (2, 2), (3, 1), (1, 3)]),
    windows=st.sampled_from([(0,), (0, 24), (40, 7)]),
    blocks=st.tuples(st.integers(11, 30), st.integers(11, 30)),
    stages=st.sampled_from([(1, 1), (1, 1), (2, 3), (4, 2)]),
    watermark=st.sampled_from([0.0, 0.05, 0.3]),
    at_once=st.integers(4, 30),
    local=st.sampled_from([0.0, 0.0, 0.2]),
    leave=st.sampled_from([0.0, 0.3]),
    slow_prefill=st.booleans(),
)
def test_every_request_ends_and_waits_no_longer_than_its_bound(
    seed: int,
    shape: tuple[int, int],
    windows: tuple[int, ...],
    blocks: tuple[int, int],
    stages: tuple[int, int],
    watermark: float,
    at_once: int,
    local: float,
    leave: float,
    slow_prefill: bool,
) -> None:
    costs = Costs(prefill_step=0.2 if slow_prefill else 0.01)
    world = World(*shape, windows=windows, blocks=blocks, stages=stages, watermark=watermark, max_running=6, costs=costs)
    keep_busy(world, Random(seed), at_once=at_once, asked=40, local=local, leave=leave)
    world.run()
    world.assert_over()


@pytest.mark.parametrize("stages", [(1, 1), (2, 3)])
def test_a_load_that_fills_both_pools_does_all_that_the_bounds_are_for(stages: tuple[int, int]) -> None:
    """Else the test above might never have met a full pool."""
    world = World(2, 2, windows=(0, 24), blocks=(24, 24), stages=stages, watermark=0.1, max_running=8)
    keep_busy(world, Random(1), at_once=30, asked=200)
    world.run()
    world.assert_over()
    assert counter(world, "preemptions") > 10
    assert counter(world, "recomputed_tokens") > 100
    assert sum(worker.below for worker in world.decodes) > 10, "grants below the watermark"
    assert max(max(worker.passes.values()) for worker in (*world.prefills, *world.decodes)) > 3, "some were passed"
    assert max(life.waited for life in world.lives.values()) > 50, "some waited long"


@pytest.mark.parametrize("where", ["at P", "at D"])
def test_a_prompt_as_large_as_the_pool_is_served_in_a_stream_of_small_ones_without_end(where: str) -> None:
    """Small ones come as fast as others end, each of a size that always fits; the large one goes through all the same."""
    world = World(1, 1, blocks=(10, 40) if where == "at P" else (40, 10), max_running=8)
    random, after = Random(2), 0
    large: Life | None = None

    def small(_: Life | None = None) -> None:
        nonlocal after
        if large is None or large.ended is None:
            after += large is not None
            world.ask(request(prompt(random, random.randint(20, 40)), max_tokens=10, ignore_eos=True), prefill=0, decode=0)

    world.ended = small
    for _ in range(12):
        small()
    world.run(until=2.0)
    large = world.ask(request(prompt(random, CONTEXT - 12), max_tokens=4, ignore_eos=True), prefill=0, decode=0)
    world.run(until=60.0)
    assert large.ended is not None, f"{after} came later and it still waits"
    assert after <= 12 + 2 * MAX_PASSES + 12, "it waited for the twelve before it and for 16 at each side, not for more"
    world.run()
    world.assert_over()


def test_a_decode_worker_that_grants_nothing_keeps_only_its_half_of_a_prefill_worker() -> None:
    world = World(1, 2, blocks=(20, 40), max_running=8)
    random = Random(3)
    stuck = world.decodes[0]
    stuck.turn = stuck.check = lambda: None  # type: ignore[method-assign]
    for i in range(60):
        world.ask(request(prompt(random, random.randint(20, 60)), max_tokens=10, ignore_eos=True), prefill=0, decode=i % 2)
    world.run()
    ended = [life for life in world.lives.values() if life.ended is not None]
    assert {life.decode for life in ended} == {1}
    assert len(ended) == 30, "all of the other's went through"
    held = world.prefills[0].pool.num_blocks[0] - world.prefills[0].pool.available()[0]
    assert 5 < held <= 10, "and what is left fills no more than half"
    del stuck.turn, stuck.check
    stuck.turn()
    world.run()
    world.assert_over()


def test_prompts_that_are_nearly_done_get_what_is_kept_for_growth_and_others_do_not() -> None:
    """Half of D is kept for growth. The second prompt is still in the making when the third is nearly done, and goes first."""
    world = World(2, 1, blocks=(20, 10), watermark=0.5, max_running=8, costs=Costs(prefill_step=1.0))
    decode = world.decodes[0]
    world.ask(request([3] * 60, max_tokens=50, ignore_eos=True), prefill=1, decode=0)
    world.run(until=2.1)
    assert decode.holders == {"r0"}
    world.ask(request([1] * 60, max_tokens=2, ignore_eos=True), prefill=0, decode=0)
    world.run(until=2.2)
    world.ask(request([2] * 30, max_tokens=2, ignore_eos=True), prefill=1, decode=0)
    world.run(until=2.5)
    assert (decode.queue, decode.below) == (["r1", "r2"], 0)
    world.run(until=2.9)
    assert (decode.queue, decode.below) == (["r1"], 1)
    world.run()
    world.assert_over()


def reachable(*roots: object) -> Counter[str]:
    """How many objects of each kind can be reached from `roots`, the models of other things (modules, classes, functions) aside."""
    seen: dict[int, object] = {}
    todo: list[object] = list(roots)
    while todo:
        thing = todo.pop()
        if id(thing) not in seen and not isinstance(thing, type | ModuleType | FunctionType | BuiltinFunctionType):
            seen[id(thing)] = thing
            todo += gc.get_referents(thing)
    return Counter(type(thing).__name__ for thing in seen.values())


def test_nothing_is_kept_of_requests_that_have_ended() -> None:
    """What workers hold at rest is the same after a hundred requests and after five hundred."""
    world = World(2, 1, windows=(0, 24), blocks=(24, 24), max_running=8)
    random = Random(5)
    held: list[Counter[str]] = []
    for asked in (100, 400):
        keep_busy(world, random, at_once=20, asked=asked)
        world.run(check=False)
        world.clock.advance(100.0)  # ids that have ended are remembered for a minute, and forgotten when the next one comes
        keep_busy(world, random, at_once=4, asked=4)
        world.run(check=False)
        world.assert_over()
        held.append(reachable(*((worker.scheduler, worker.machine) for worker in (*world.prefills, *world.decodes))))
    few, many = held
    assert many.total() <= 1.1 * few.total(), many - few

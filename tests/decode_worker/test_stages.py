"""The decode scheduler of a pipeline: who is in which of the steps in flight."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from decode_harness import Worker, name_of, prompt
from hypothesis import given, settings
from hypothesis import strategies as st


def worker_with(running: int, stages: int, **shape: int) -> Worker:
    """`running` requests that decode, none of them in a step."""
    worker = Worker(stages=stages, **{"blocks": 100, "chunk_tokens": 200, "max_running": 32} | shape)  # type: ignore[arg-type]
    for i in range(running):
        worker.expect(f"a{i}", prompt(5, i), local=True, max_tokens=100, ignore_eos=True)
    worker.step()
    return worker


@pytest.mark.parametrize(
    ("running", "stages", "shares"),
    [(6, 1, [6]), (6, 2, [3, 3]), (7, 3, [3, 3, 1]), (4, 4, [1, 1, 1, 1]), (3, 4, [1, 1, 1]), (1, 2, [1])],
)
def test_the_steps_in_flight_share_those_that_decode(running: int, stages: int, shares: list[int]) -> None:
    worker = worker_with(running, stages)
    for _ in range(3):
        steps = worker.fill()
        assert [len(step.attempts) for step in steps] == shares
        assert [name for step in steps for name in step.attempts] == [f"a{i}" for i in range(running)], "the oldest first"
        worker.finish(len(steps))
    for step in worker.fill():
        worker.finish()
        assert [again.attempts for again in worker.fill()] == [step.attempts], "the same go on together"
    worker.drain()


def test_nothing_is_decided_until_a_token_is_known() -> None:
    worker = worker_with(1, 3)
    assert len(worker.fill()) == 1
    assert worker.decide() is None
    worker.finish()
    assert len(worker.fill()) == 1
    worker.drain()


def test_chunks_of_a_prompt_are_in_successive_steps_beside_those_that_decode() -> None:
    worker = worker_with(2, 4, chunk_tokens=32)
    worker.expect("new", prompt(80, 9), local=True, max_tokens=3, ignore_eos=True)
    steps = [[(row.start, row.length) for row in step.batch.rows] for step in worker.fill()]
    assert steps == [[(5, 1), (0, 32)], [(5, 1), (32, 32)], [(64, 16)]]
    worker.finish(2)
    assert [step.attempts for step in worker.fill()] == [("a0",), ("a1",)], "its first token is still to come"
    worker.finish()
    assert [step.attempts for step in worker.fill()] == [("new",)]
    worker.drain()


def test_choices_that_part_have_their_blocks_copied_by_the_first_step() -> None:
    worker = Worker(stages=2, max_running=8)
    worker.expect("a", prompt(20), local=True, n=3, max_tokens=20, ignore_eos=True)
    assert len(worker.fill()) == 1, "they are one until their first tokens are known"
    worker.finish()
    first, second = worker.fill()
    assert [len(step.batch.rows) for step in (first, second)] == [2, 1]
    assert [len(step.batch.copies) for step in (first, second)] == [4, 0], "two choices, two groups"
    worker.drain()


def test_the_token_of_a_choice_preempted_in_flight_counts() -> None:
    worker = Worker(windows=(0,), blocks=6, stages=2)
    for attempt_id, length in (("old", 40), ("young", 20)):
        worker.expect(attempt_id, prompt(length, length), local=True, max_tokens=50, ignore_eos=True)
    worker.fill()
    worker.expect("lent", prompt(10), max_tokens=2, ignore_eos=True)
    worker.offer("lent")
    worker.scheduler.nearly_done("lent", 0.0)
    assert worker.grant() == ["lent"], "the last block"
    while not worker.scheduler._admission.preempted:
        worker.finish()
        worker.fill()
    (young,) = worker.scheduler._admission.preempted
    assert (young.attempt_id, young.pending) == ("young", 1)
    had = len(worker.tokens["young"])
    while young.pending:
        worker.finish()
        assert all("young" not in step.attempts for step in worker.fill())
    assert len(worker.tokens["young"]) == had + 1
    worker.drain()
    assert worker.finished["young"].recomputed_tokens > 0
    assert worker.finished["old"].recomputed_tokens == 0


def test_a_choice_stopped_in_flight_says_nothing_more() -> None:
    worker = Worker(stages=2, max_running=8)
    worker.expect("a", prompt(20), local=True, n=4, max_tokens=12, ignore_eos=True)
    worker.fill()
    worker.finish()
    assert len(worker.fill()) == 2
    worker.stop("a", 1)
    worker.stop("a", 3)
    worker.drain()
    assert worker.ends.keys() == {"a", "a/2"}
    assert [len(worker.tokens[name_of("a", choice)]) for choice in range(4)] == [12, 1, 12, 1]


def test_a_transfer_that_commits_takes_part_in_the_next_step() -> None:
    worker = worker_with(2, 2)
    worker.expect("far", prompt(40, 9), max_tokens=5, ignore_eos=True)
    worker.offer("far")
    worker.fill()
    assert worker.grant() == ["far"]
    worker.commit("far")
    worker.finish()
    assert [step.attempts for step in worker.fill()] == [("a0", "far")]
    worker.drain()


class Waits:
    """Counts how many steps in a row left each sequence out although it had all it needs, while those older than it were the same."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.longest = 0
        self._left_out: dict[int, tuple[list[int], int]] = {}

    def fill(self) -> None:
        while len(self.worker.decided) < self.worker.stages and self._decide():
            pass

    def _decide(self) -> bool:
        running = self.worker.scheduler._roster.running
        decoding = [sequence for sequence in running if sequence.decoding]
        orders = [sequence.order for sequence in decoding]
        waiting = {sequence.order: sequence for sequence in decoding if not sequence.pending}
        if self.worker.decide() is None:
            return False
        counts: dict[int, tuple[list[int], int]] = {}
        for order, sequence in waiting.items():
            ready = sequence.slot >= 0 and sequence.table.reaches(sequence.length)
            if sequence in running and ready and not sequence.pending:
                older = orders[: orders.index(order)]
                before, count = self._left_out.get(order, (older, 0))
                counts[order] = older, count + 1 if before == older else 1
                self.longest = max(self.longest, counts[order][1])
        self._left_out = counts
        return True


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    stages=st.integers(1, 4),
    windows=st.sampled_from([(0,), (24,), (0, 24)]),
    blocks=st.integers(11, 60),
    max_running=st.integers(1, 16),
    one_by_one=st.booleans(),
)
def test_nobody_is_left_out_for_long_and_tokens_are_those_of_one_stage(
    seed: int, stages: int, windows: tuple[int, ...], blocks: int, max_running: int, one_by_one: bool
) -> None:
    """`answer`, with which the harness compares every output, knows neither steps nor stages."""
    random = Random(seed)
    worker = Worker(windows=windows, blocks=blocks, max_running=max_running, stages=stages)
    waits, asked = Waits(worker), 0
    for _ in range(100):
        if random.random() < 0.3:
            length, n = random.randint(1, 90), random.choice([1, 1, 1, 3])
            sampling = {"max_tokens": random.randint(1, 60), "ignore_eos": random.random() < 0.5, "n": n}
            worker.expect(f"a{asked}", prompt(length, random.randrange(5)), local=random.random() < 0.5, **sampling)
            asked += 1
        transfers(worker, random)
        waits.fill()
        if worker.decided:
            worker.finish(1 if one_by_one else random.randint(1, len(worker.decided)))
        worker.scheduler.check()
    assert waits.longest <= (stages - 1 if one_by_one else 2 * stages - 2)
    worker.drain()


def transfers(worker: Worker, random: Random) -> None:
    """Some go on."""
    turns: list[tuple[Callable[[str], None], list[str]]] = [
        (worker.offer, sorted(worker.expected)),
        (worker.commit, sorted(worker.granted)),
    ]
    for act, names in turns:
        for name in names:
            if random.random() < 0.5:
                act(name)
    worker.grant()


def test_the_bound_is_met() -> None:
    """Else the test above might never have left anybody out."""
    worker = worker_with(9, 3)
    waits = Waits(worker)
    waits.fill()
    assert waits.longest == 2
    worker.drain()


def test_a_twin_of_one_stage_says_the_same() -> None:
    said = []
    for stages in (1, 2, 3, 4):
        worker = Worker(stages=stages, blocks=12, max_running=6)
        for i in range(8):
            worker.expect(f"a{i}", prompt(10 + 9 * i, i), local=True, max_tokens=30, n=1 + i % 3, repetition_penalty=1.0 + i % 2)
        while worker.fill() or worker.decided:
            worker.finish()
        worker.drain()
        said.append(worker.tokens)
    assert said[0] == said[1] == said[2] == said[3]

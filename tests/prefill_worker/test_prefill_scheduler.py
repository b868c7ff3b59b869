"""The prefill scheduler: its rules one by one, and all of them at once against a fake engine."""

from __future__ import annotations

from collections import deque

import pytest
from diptych.core.commands import FirstTokens, Prefill
from diptych.core.errors import ContextExceeded, InvalidRequest
from diptych.core.request import FinishReason
from diptych.engine.block_pool import BlockPool
from diptych.prefill_worker import scheduler as scheduler_module
from diptych.prefill_worker.leases import RECENT
from diptych.prefill_worker.scheduler import Decision, PrefillScheduler
from fake_engine import BLOCK, EOS, FakeEngine, answer, digests, groups, hashes_of, request
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, consumes, initialize, invariant, rule
from step_rules import StepRules

CONTEXT = 160


class Worker:
    """A prefill worker without shells: scheduler and fake engine, steps in flight, what came of each attempt."""

    def __init__(
        self, *, windows: tuple[int, ...] = (0, 24), blocks: int = 12, chunk_tokens: int = 32, max_running: int = 4, context: int = CONTEXT
    ) -> None:
        self.groups, self.context = groups(*windows), context
        counts = (blocks,) * len(windows)
        self.pool = BlockPool(counts, self.groups, BLOCK)
        self.engine = FakeEngine(self.groups, counts, max_running)
        self.scheduler = PrefillScheduler(
            self.pool, hashes_of=hashes_of, chunk_tokens=chunk_tokens, max_running=max_running, max_context=context, eos_token_ids=EOS
        )
        self.chunk_tokens = chunk_tokens
        self.decided: deque[Decision] = deque()
        self.outputs: deque[object] = deque()
        self.prefills: dict[str, Prefill] = {}
        self.started: list[str] = []
        self.offered: set[str] = set()
        self.first_tokens: dict[str, FirstTokens] = {}
        self.finished: list[str] = []
        self.tables: dict[str, tuple[tuple[int, ...], ...]] = {}
        self.now = 0.0

    def add(self, attempt_id: str, token_ids: list[int], destination: str | None = "d", **sampling: object) -> None:
        prefill = Prefill(attempt_id, request(token_ids, **sampling), destination)
        self.scheduler.add(prefill, self.now)
        self.prefills[attempt_id] = prefill

    def decide(self) -> Decision | None:
        decision = self.scheduler.decide(self.now)
        if decision is None:
            return None
        users = {row.slot: name for step in self.decided for name, row in zip(step.attempts, step.batch.rows, strict=True)}
        for name, row in zip(decision.attempts, decision.batch.rows, strict=True):
            assert users.get(row.slot, name) == name, "a slot in flight belongs to another"
        self.decided.append(decision)
        assert sum(row.length for row in decision.batch.rows) <= self.chunk_tokens
        for started in decision.started:
            assert started.attempt_id in decision.attempts
            assert started.cached_tokens < started.prompt_tokens == len(self.prefills[started.attempt_id].request.token_ids)
            self.started.append(started.attempt_id)
            if started.destination is not None:
                self.offered.add(started.attempt_id)
        for attempt_id, row in zip(decision.attempts, decision.batch.rows, strict=True):
            self.tables[attempt_id] = row.tables
        return decision

    def run(self) -> None:
        self.outputs.append(self.engine.run(self.decided[len(self.outputs)].batch))

    def complete(self) -> None:
        self.now += 1.0
        self.decided.popleft()
        outcome = self.scheduler.complete(self.outputs.popleft(), self.now)  # type: ignore[arg-type]
        for first in outcome.first_tokens:
            assert first.attempt_id not in self.first_tokens, "one first token"
            self.first_tokens[first.attempt_id] = first
            self._check_first(first)
        for finished in outcome.finished:
            assert None not in self.first_tokens[finished.attempt_id].finishes
            self.finished.append(finished.attempt_id)

    def _check_first(self, first: FirstTokens) -> None:
        prefill = self.prefills[first.attempt_id]
        assert tuple(token.choice for token in first.tokens) == prefill.request.opening
        for token, told in zip(first.tokens, first.finishes, strict=True):
            output, finish = answer(prefill.request, self.groups, self.context, token.choice)
            index = len(prefill.request.generated_by(token.choice))
            ended = len(output) == index + (finish is FinishReason.LENGTH)
            assert token.index == index
            assert told is (finish if ended else FinishReason.LENGTH if prefill.destination is None else None)
            if len(output) > index:
                assert token.id == output[index]
            else:
                assert token.id in EOS

    def step(self) -> bool:
        """Decide, run and complete one step."""
        if self.decide() is None:
            return False
        self.run()
        self.complete()
        return True

    def release(self, attempt_id: str) -> None:
        """The destination has everything; what it read must have been right."""
        if attempt_id in self.first_tokens:
            self.check_kv(attempt_id)
        self.offered.discard(attempt_id)
        self.scheduler.release(attempt_id, self.now)

    def check_kv(self, attempt_id: str) -> None:
        """All KV that the next query sees, in every group, is still in the leased blocks."""
        token_ids = self.prefills[attempt_id].request.token_ids
        values, end = digests(token_ids), len(token_ids)
        expected = [values[group.first_needed(end) :] for group in self.groups]
        assert self.engine.seen(self.tables[attempt_id], end, end) == expected

    def drain(self) -> None:
        """Let everything go through: destinations grant, transfers end. Whoever is left starves."""
        for _ in range(2000):
            for attempt_id in list(self.offered):
                self.scheduler.granted(attempt_id)
                if attempt_id in self.first_tokens:
                    self.release(attempt_id)
            self.scheduler.check()
            if self.decided:
                if not self.outputs:
                    self.run()
                self.complete()
            elif self.decide() is None and not self.offered:
                break
        load = self.scheduler.load(self.now)
        assert (load.waiting, load.running, load.leases) == (0, 0, 0)
        assert load.prompt_tokens_waiting == 0
        assert load.blocks_free == load.blocks_total
        self.scheduler.check()
        assert self.pool.unused


def prompt(length: int, family: int = 1) -> list[int]:
    """Prompts of one family share what they have in common."""
    return [1 + (family * 7 + i * i) % 38 for i in range(length)]


def test_a_prompt_is_computed_in_chunks_and_offered_with_the_first() -> None:
    worker = Worker()
    worker.add("a", prompt(70))
    decision = worker.decide()
    assert decision is not None
    assert [started.attempt_id for started in decision.started] == ["a"]
    spans = [(row.start, row.start + row.length) for row in decision.batch.rows]
    while (decision := worker.decide()) is not None:
        assert decision.started == ()
        spans += [(row.start, row.start + row.length) for row in decision.batch.rows]
        worker.run()
        worker.complete()
    assert spans == [(0, 32), (32, 64), (64, 70)]
    worker.drain()
    assert "a" in worker.first_tokens


def test_with_four_stages_five_chunks_of_a_prompt_are_in_flight() -> None:
    """What a window has passed is free for the sixth when the last step that reads it has completed, and no sooner; what is published has
    been computed."""
    worker = Worker(windows=(24,), blocks=10, context=400)
    worker.add("a", prompt(300))
    spans = [(row.start, row.length) for step in iter(worker.decide, None) for row in step.batch.rows]
    assert spans == [(0, 32), (32, 32), (64, 32), (96, 32), (128, 32)]
    assert worker.pool.parts[0].fenced == 8, "all but what the sixth still needs; it was looked at, and found no block"
    hashes = worker.scheduler._running["a"].table.hashes
    assert [worker.pool.parts[0].find(each) for each in hashes[1:]] == [None] * 18
    worker.run()
    worker.complete()
    assert worker.decide() is None, "the second step reads what the first has stored"
    worker.run()
    worker.complete()
    step = worker.decide()
    assert step is not None
    assert (step.batch.rows[0].start, worker.pool.parts[0].fenced) == (160, 6)
    worker.drain()
    assert "a" in worker.first_tokens


def test_a_cached_prefix_is_skipped_but_never_the_last_token() -> None:
    worker = Worker()
    for attempt_id in "ab":
        worker.add(attempt_id, prompt(64))
        while worker.step():
            pass
        worker.release(attempt_id)
    assert worker.first_tokens["a"].cached_tokens == 0
    assert worker.first_tokens["b"].cached_tokens == 48
    worker.drain()


def test_the_budget_is_shared_by_the_rows_of_a_step() -> None:
    worker = Worker()
    for attempt_id in "abc":
        worker.add(attempt_id, prompt(10, ord(attempt_id)))
    decision = worker.decide()
    assert decision is not None
    assert [row.length for row in decision.batch.rows] == [10, 10, 10]
    worker.drain()


def test_what_can_never_fit_is_refused() -> None:
    worker = Worker(blocks=5)
    with pytest.raises(ContextExceeded, match="81 tokens"):
        worker.add("a", prompt(81))
    with pytest.raises(ContextExceeded, match="160"):
        Worker().add("a", prompt(160))
    with pytest.raises(InvalidRequest, match="no token"):
        worker.add("a", [])
    with pytest.raises(InvalidRequest, match="max_tokens"):
        worker.add("a", prompt(3), generated=[[1, 2]], max_tokens=2)
    with pytest.raises(InvalidRequest, match="tokens of their own"):
        worker.add("a", prompt(3), None, generated=[[1], []], max_tokens=2, n=2)
    worker.add("a", prompt(80))
    with pytest.raises(InvalidRequest, match="under way"):
        worker.add("a", prompt(3))
    worker.drain()


def test_a_window_group_is_not_filled_by_a_long_prompt() -> None:
    worker = Worker(windows=(24,), blocks=5, context=10_000)
    worker.add("a", prompt(2_000))
    worker.drain()
    assert "a" in worker.first_tokens


def test_what_does_not_fit_is_passed_and_does_not_starve() -> None:
    worker = Worker(max_running=8)
    worker.add("held", prompt(100, 1), "x")
    while worker.step():
        pass
    worker.scheduler.granted("held")
    worker.add("large", prompt(150, 2), "y")
    for i in range(40):
        worker.add(f"small{i}", prompt(10, 3 + i), None)
    while worker.step():
        pass
    passes = scheduler_module.MAX_PASSES
    assert worker.started == ["held", *(f"small{i}" for i in range(passes))]
    worker.release("held")
    worker.step()
    assert worker.started[passes + 1] == "large"
    worker.drain()


def for_another(worker: Worker) -> None:
    """Have had a prompt for a destination that no other is for."""
    worker.add("gone", prompt(10), "another")
    worker.scheduler.cancel("gone", 0.0)


def test_a_destination_that_does_not_grant_fills_half_the_pool_and_blocks_no_other() -> None:
    worker = Worker(max_running=8)
    for i in range(4):
        worker.add(f"slow{i}", prompt(40, i), "slow")
    worker.add("quick", prompt(40, 9), "quick")
    while worker.step():
        pass
    assert worker.started == ["slow0", "slow1", "quick"]
    worker.scheduler.granted("slow0")
    while worker.step():
        pass
    assert worker.started == ["slow0", "slow1", "quick", "slow2"]
    worker.drain()


def test_a_destination_without_another_may_fill_the_pool() -> None:
    worker = Worker(max_running=8)
    for i in range(4):
        worker.add(f"slow{i}", prompt(40, i), "slow")
    while worker.step():
        pass
    assert worker.started == ["slow0", "slow1", "slow2", "slow3"]
    worker.drain()


def test_a_destination_that_came_back_by_another_address_is_alone_after_some_prompts() -> None:
    worker = Worker(max_running=8)
    for_another(worker)
    for i in range(RECENT - 1):
        worker.add(f"before{i}", prompt(10, i))
        worker.scheduler.cancel(f"before{i}", 0.0)
    for i in range(4):
        worker.add(f"slow{i}", prompt(40, i))
        while worker.step():
            pass
    assert worker.started == ["slow0", "slow1", "slow2", "slow3"]
    worker.release("slow3")
    worker.add("slow4", prompt(10, 4))
    worker.add("quick", prompt(10, 9), "quick")
    while worker.step():
        pass
    assert worker.started[4:] == ["quick"], "there are two again"
    worker.drain()


def test_small_prompts_do_not_starve_a_large_one_to_the_same_destination() -> None:
    worker = Worker(max_running=8)
    for_another(worker)
    worker.add("first", prompt(20, 1), "d")
    worker.add("large", prompt(90, 2), "d")
    passes = scheduler_module.MAX_PASSES
    for i in range(passes + 4):
        worker.add(f"small{i}", prompt(10, 3 + i), "d")
        while worker.step():
            pass
        if f"small{i}" in worker.offered:
            worker.scheduler.granted(f"small{i}")
            worker.release(f"small{i}")
    assert worker.started == ["first", *(f"small{i}" for i in range(passes))]
    worker.add("elsewhere", prompt(10, 2), "e")
    worker.step()
    assert worker.started[-1] == "elsewhere"
    worker.drain()


def test_a_prompt_larger_than_the_share_starts_alone() -> None:
    worker = Worker()
    for_another(worker)
    worker.add("a", prompt(150), "d")
    worker.add("b", prompt(10, 2), "d")
    while worker.step():
        pass
    assert worker.started == ["a"]
    worker.drain()
    assert worker.started == ["a", "b"]


def test_cancel_acts_in_every_state() -> None:
    worker = Worker()
    worker.add("waiting", prompt(40))
    assert worker.scheduler.cancel("waiting", 0.0) is False
    worker.add("running", prompt(40))
    worker.decide()
    assert worker.scheduler.cancel("running", 0.0) is True
    assert worker.decide() is None
    worker.run()
    worker.complete()
    assert worker.scheduler.cancel("running", 0.0) is True
    worker.release("running")
    worker.add("alone", prompt(40), None)
    worker.decide()
    assert worker.scheduler.cancel("alone", 0.0) is False
    worker.add("leased", prompt(40))
    worker.run()
    worker.complete()
    while worker.step():
        pass
    assert worker.scheduler.cancel("leased", 0.0) is True
    worker.release("leased")
    assert worker.scheduler.cancel("never heard of", 0.0) is False
    worker.drain()
    assert set(worker.first_tokens) == {"leased"}


def test_a_retry_goes_on_after_the_tokens_sent() -> None:
    worker = Worker()
    worker.add("a", prompt(20), generated=[[5, 6, 7]], max_tokens=9)
    worker.drain()
    assert [token.index for token in worker.first_tokens["a"].tokens] == [3]


def test_a_retry_of_several_choices_computes_the_prompt_and_opens_those_that_have_nothing() -> None:
    worker = Worker()
    worker.add("a", prompt(20), generated=[[5, 6], [], [], []], finished=[2], max_tokens=9, n=4)
    worker.add("b", prompt(20), generated=[[5, 6], [7]], max_tokens=9, n=2)
    worker.drain()
    assert [(token.index, token.choice) for token in worker.first_tokens["a"].tokens] == [(0, 1), (0, 3)]
    assert worker.first_tokens["b"].tokens == ()
    assert worker.finished == []


def test_choices_draw_from_one_row_each_its_own() -> None:
    worker = Worker()
    worker.add("many", prompt(20), n=8, max_tokens=9)
    worker.add("one", prompt(20), max_tokens=9)
    worker.drain()
    assert worker.first_tokens["many"].tokens[0] == worker.first_tokens["one"].tokens[0]
    assert len({token.id for token in worker.first_tokens["many"].tokens}) > 4


class Prefills(StepRules):
    """Commands, steps (up to two in flight, or five, as with four stages; run late) and transfers that end at any time."""

    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.worker = Worker()
        self.depth = 2
        self.cancelled: set[str] = set()

    @initialize(depth=st.integers(2, 5), blocks=st.integers(10, 20), windows=st.sampled_from([(0, 24), (24,), (40, 7)]))
    def set_up(self, depth: int, blocks: int, windows: tuple[int, ...]) -> None:
        self.worker, self.depth = Worker(blocks=blocks, windows=windows), depth

    @rule(
        target=attempts,
        family=st.integers(1, 3),
        length=st.integers(1, CONTEXT - 1),
        destination=st.sampled_from(["x", "y", None]),
        max_tokens=st.integers(1, 3),
        tenant=st.sampled_from(["", "", "t"]),
        n=st.sampled_from([1, 1, 2, 5]),
    )
    def add(self, family: int, length: int, destination: str | None, max_tokens: int, tenant: str, n: int) -> str:
        attempt_id = f"a{len(self.worker.prefills)}"
        self.worker.add(attempt_id, prompt(length, family), destination, max_tokens=max_tokens, tenant=tenant, n=n)
        return attempt_id

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            while len(self.worker.decided) < self.depth and self.worker.decide() is not None:
                pass
            if len(self.worker.outputs) < len(self.worker.decided):
                self.worker.run()
            if self.worker.outputs:
                self.worker.complete()

    @rule(attempt_id=attempts)
    def grant(self, attempt_id: str) -> None:
        if attempt_id in self.worker.offered:
            self.worker.scheduler.granted(attempt_id)

    @rule(attempt_id=consumes(attempts))
    def hand_over(self, attempt_id: str) -> None:
        if attempt_id in self.worker.offered and attempt_id in self.worker.first_tokens:
            self.worker.release(attempt_id)

    @rule(attempt_id=attempts)
    def cancel(self, attempt_id: str) -> None:
        held = self.worker.scheduler.cancel(attempt_id, self.worker.now)
        assert held == (attempt_id in self.worker.offered)
        self.cancelled.add(attempt_id)

    @rule(attempt_id=consumes(attempts))
    def lose(self, attempt_id: str) -> None:
        if self.worker.scheduler.cancel(attempt_id, self.worker.now):
            self.worker.release(attempt_id)
        self.cancelled.add(attempt_id)

    @invariant()
    def sound(self) -> None:
        self.worker.scheduler.check()

    def teardown(self) -> None:
        worker = self.worker
        for attempt_id in self.cancelled & worker.offered:
            worker.release(attempt_id)
        worker.drain()
        assert worker.prefills.keys() - self.cancelled <= worker.first_tokens.keys(), "a prompt starved"
        alone = {attempt_id for attempt_id, first in worker.first_tokens.items() if None not in first.finishes}
        assert sorted(worker.finished) == sorted(alone)


TestPrefills = Prefills.TestCase
TestPrefills.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)

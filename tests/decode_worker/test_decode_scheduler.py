"""The decode scheduler: its rules one by one."""

from __future__ import annotations

import math
from collections import deque

import pytest
from decode_harness import Worker, name_of, prompt
from diptych.core.commands import ChoiceFinished, Finished
from diptych.core.errors import ContextExceeded, InvalidRequest
from diptych.core.request import FinishReason, Request
from diptych.core.transfer import RefusedReason
from diptych.decode_worker.admission import MAX_PASSES
from diptych.decode_worker.steady import Steady
from diptych.engine.batch import Drawn, StepOutput
from diptych.engine.block_pool import BlockPool
from fake_engine import BLOCK, answer, request
from hypothesis import example, given, settings
from hypothesis import strategies as st


def test_a_transfer_decodes_from_the_step_after_its_commit() -> None:
    worker = Worker()
    worker.expect("a", prompt(40), max_tokens=5, ignore_eos=True)
    assert worker.grant() == []
    worker.offer("a")
    assert worker.grant() == ["a"]
    assert worker.decide() is None
    worker.commit("a")
    decision = worker.step()
    assert decision is not None
    assert [(row.start, len(row.token_ids)) for row in decision.batch.rows] == [(40, 1)]
    worker.drain()
    assert worker.ends["a"] is FinishReason.LENGTH
    assert len(worker.tokens["a"]) == 5


def test_a_grant_counts_on_the_cached_prefix_and_sends_only_the_window() -> None:
    worker = Worker()
    for attempt_id in "ab":
        worker.expect(attempt_id, prompt(80), max_tokens=2, ignore_eos=True)
        worker.offer(attempt_id)
        worker.grant()
        full, window = worker.granted[attempt_id]
        if attempt_id == "a":
            assert (full.first_position, len(full.blocks)) == (0, 5)
            assert (window.first_position, len(window.blocks)) == (48, 2)
            worker.commit("a")
    assert (full.blocks, window.blocks) == ((), ())
    worker.drain()
    assert worker.finished["b"].cached_tokens == 80


def test_a_step_may_be_decided_while_two_are_in_flight() -> None:
    worker = Worker()
    worker.expect("a", prompt(10), local=True, max_tokens=4, ignore_eos=True)
    rows = [decision.batch.rows[0] for decision in iter(worker.decide, None)]
    assert [(row.start, len(row.token_ids)) for row in rows] == [(0, 10), (10, 0), (11, 0), (12, 0)]
    assert [draw.index for row in rows for draw in row.draws] == [0, 1, 2, 3]
    worker.drain()


def test_a_row_decided_before_the_end_was_known_is_discarded() -> None:
    worker = Worker()
    expected, finish = answer(request(prompt(13), max_tokens=100), worker.groups, worker.longest)
    assert finish is FinishReason.STOP, "this prompt should end with an end token"
    worker.expect("a", prompt(13), local=True, max_tokens=100)
    for _ in range(2 * len(expected)):
        while len(worker.decided) < 3 and worker.decide():
            pass
        if worker.decided:
            worker.run()
            worker.complete()
    worker.drain()
    assert worker.tokens["a"] == expected


def test_decodes_go_on_beside_a_long_local_prompt() -> None:
    worker = Worker(max_running=4)
    worker.expect("old", prompt(10), local=True, max_tokens=20, ignore_eos=True)
    worker.step()
    worker.expect("new", prompt(120, 2), local=True, max_tokens=3, ignore_eos=True)
    for spans in ([1, 32], [1, 32], [1, 32], [1, 24], [1, 1]):
        decision = worker.step()
        assert decision is not None
        assert [row.length for row in decision.batch.rows] == spans
    worker.drain()
    assert worker.finished["new"].local_prefill_tokens == 120
    assert worker.finished["old"].recomputed_tokens == 0


def test_a_local_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    worker = Worker()
    for attempt_id in "ab":
        worker.expect(attempt_id, prompt(64), local=True, max_tokens=2, ignore_eos=True)
        worker.drain()
    assert [worker.finished[attempt_id].cached_tokens for attempt_id in "ab"] == [0, 48]
    assert worker.finished["b"].local_prefill_tokens == 16


def test_the_youngest_is_preempted_and_computed_again() -> None:
    worker = Worker(windows=(0,), blocks=9)
    for attempt_id in "ab":
        worker.expect(attempt_id, prompt(48, ord(attempt_id)), local=True, max_tokens=60, ignore_eos=True)
    worker.drain()
    assert worker.finished["a"].recomputed_tokens == 0
    assert worker.finished["b"].recomputed_tokens > 0


def test_a_slot_is_not_reused_while_a_step_with_it_is_in_flight() -> None:
    worker = Worker(max_running=1)
    worker.expect("a", prompt(10), local=True)
    worker.decide()
    worker.decide()
    worker.cancel("a")
    worker.expect("b", prompt(10, 2), local=True)
    for _ in range(2):
        assert worker.decide() is None
        worker.run()
        worker.complete()
    assert worker.decide() is not None
    worker.drain()


def test_what_comes_before_a_step_begins_goes_with_it() -> None:
    worker = Worker(chunk_tokens=32)
    for attempt_id in "ab":
        worker.expect(attempt_id, prompt(20, ord(attempt_id)), max_tokens=8, ignore_eos=True)
        worker.offer(attempt_id)
    worker.grant()
    worker.commit("a")
    worker.decide()
    worker.run()
    decision = worker.decide()
    assert decision is not None
    assert not worker.join(), "nobody has come"
    worker.commit("b")
    worker.expect("c", prompt(40, 3), local=True, max_tokens=4)
    assert worker.join()
    assert worker.decided[-1].attempts == ("a", "b", "c")
    assert [row.length for row in worker.decided[-1].batch.rows] == [1, 1, 32], "of a prompt as much as fits"
    worker.run()
    assert not worker.join(), "it has begun"
    worker.drain()


def test_where_stages_share_out_those_who_decode_nothing_joins() -> None:
    worker = Worker(stages=2)
    worker.expect("a", prompt(20), local=True)
    worker.decide()
    worker.expect("b", prompt(20, 2), local=True)
    assert not worker.join()
    worker.drain()


def test_no_more_are_preempted_than_needed_while_steps_are_in_flight() -> None:
    worker = Worker(windows=(0,), blocks=9, watermark=0.0)
    for attempt_id in "abc":
        worker.expect(attempt_id, prompt(32, ord(attempt_id)), local=True, max_tokens=40, ignore_eos=True)
    while worker.scheduler.steady() == 0:
        worker.step()
    while len(worker.tokens["a"]) < 40 and "a" not in worker.finished:
        while len(worker.decided) < 2 and worker.decide():
            pass
        worker.run()
        worker.complete()
        assert worker.scheduler.load(0.0).prompt_tokens_waiting <= 32 + 40, "two of three are thrown out"
    worker.drain()


def test_new_work_leaves_the_watermark_free() -> None:
    worker = Worker(windows=(0,), blocks=10, watermark=0.3)
    for attempt_id, length in (("a", 64), ("b", 64), ("c", 40)):
        worker.expect(attempt_id, prompt(length, ord(attempt_id)), max_tokens=2, ignore_eos=True)
        worker.offer(attempt_id)
    assert worker.grant() == ["a", "c"]
    worker.drain()


def test_below_the_watermark_only_a_transfer_that_is_nearly_done_is_granted() -> None:
    worker = Worker(windows=(0,), blocks=10, watermark=0.3, max_running=8)
    for attempt_id in "abc":
        worker.expect(attempt_id, prompt(64, ord(attempt_id)), max_tokens=2, ignore_eos=True)
        worker.offer(attempt_id)
    worker.expect("local", prompt(16, 1), local=True, max_tokens=2, ignore_eos=True)
    assert worker.grant() == ["a"]
    worker.scheduler.nearly_done("c", 0.0)
    assert worker.grant() == ["c"], "in front of b, which is not, and of the local prompt, which would leave 1 of 10 blocks"
    worker.scheduler.nearly_done("b", 0.0)
    assert worker.grant() == [], "there are not enough blocks at all"
    worker.scheduler.nearly_done("unknown", 0.0)
    worker.drain()


def test_growth_goes_before_what_was_granted_below_the_watermark() -> None:
    worker = Worker(windows=(0,), blocks=10, watermark=0.3)
    for attempt_id, length in (("old", 64), ("new", 80)):
        worker.expect(attempt_id, prompt(length, len(attempt_id)), max_tokens=60, ignore_eos=True)
        worker.offer(attempt_id)
    assert worker.grant() == ["old"]
    worker.commit("old")
    worker.scheduler.nearly_done("new", 0.0)
    assert worker.grant() == ["new"]
    worker.commit("new")
    worker.drain()
    assert worker.finished["old"].recomputed_tokens == 0
    assert worker.finished["new"].recomputed_tokens > 0, "what was kept for growth is taken back from the youngest"


def test_what_waits_behind_a_request_that_lacks_blocks_is_granted_when_that_is_given_up() -> None:
    worker = Worker(windows=(0,), blocks=4)
    worker.expect("short", prompt(16), local=True, max_tokens=40, ignore_eos=True)
    worker.step()
    for attempt_id, length in (("lent", 48), ("next", 10)):
        worker.expect(attempt_id, prompt(length, length), max_tokens=2, ignore_eos=True)
        worker.offer(attempt_id)
        worker.scheduler.nearly_done(attempt_id, 0.0)
    assert worker.grant() == ["lent"]
    assert worker.decide() is None, "its next block is lent"
    worker.cancel("short")
    assert worker.scheduler.grants(0.0) == [], "not before it is known that nobody lacks blocks any more"
    assert worker.decide() is None
    (granted,) = worker.scheduler.new_grants()
    assert granted[0] == "next"
    worker.offered.remove("next")
    worker.granted["next"] = granted[1]
    worker.drain()


def test_a_large_prompt_is_passed_a_bounded_number_of_times() -> None:
    worker = Worker(windows=(0,), blocks=10, max_running=8)
    worker.expect("held", prompt(60, 1), max_tokens=90, ignore_eos=True)
    worker.expect("large", prompt(130, 2), max_tokens=2, ignore_eos=True)
    for attempt_id in ("held", "large"):
        worker.offer(attempt_id)
    assert worker.grant() == ["held"]
    smalls = []
    for i in range(MAX_PASSES + 5):
        worker.expect(f"small{i}", prompt(10, 3 + i), max_tokens=2, ignore_eos=True)
        worker.offer(f"small{i}")
        for attempt_id in worker.grant():
            smalls.append(attempt_id)
            worker.cancel(attempt_id)
            worker.fence(attempt_id)
    assert len(smalls) == MAX_PASSES
    worker.drain()


def test_a_prompt_as_large_as_the_pool_is_granted_when_nothing_else_holds_memory() -> None:
    worker = Worker(windows=(0,), blocks=4)
    worker.expect("a", prompt(63), max_tokens=9, ignore_eos=True)
    worker.offer("a")
    assert worker.grant() == ["a"]
    worker.drain()
    assert len(worker.tokens["a"]) == 1, "the pool is the end of the context"


def test_what_can_never_fit_and_what_is_no_prompt_are_refused() -> None:
    worker = Worker(windows=(0,), blocks=4)
    with pytest.raises(ContextExceeded, match="64"):
        worker.expect("a", prompt(64))
    with pytest.raises(InvalidRequest, match="no token"):
        worker.expect("a", [])
    with pytest.raises(InvalidRequest, match="max_tokens"):
        worker.expect("a", prompt(3), generated=[[1, 2]], max_tokens=2)
    worker.expect("a", prompt(10))
    with pytest.raises(InvalidRequest, match="under way"):
        worker.expect("a", prompt(10))
    assert worker.scheduler.on_offer("a", 11, 0.0) is RefusedReason.FAILED
    assert worker.scheduler.on_offer("unknown", 11, 0.0) is RefusedReason.CLOSED
    worker.drain()


def test_a_lost_transfer_keeps_its_blocks_until_the_fence() -> None:
    worker = Worker(windows=(0,), blocks=4)
    for attempt_id in "ab":
        worker.expect(attempt_id, prompt(60, ord(attempt_id)), max_tokens=2)
        worker.offer(attempt_id)
    assert worker.grant() == ["a"]
    worker.lose("a")
    assert worker.grant() == []
    assert worker.scheduler.load(0.0).leases == 1
    worker.fence("a")
    assert worker.grant() == ["b"]
    worker.drain()


def test_a_commit_that_was_faster_than_the_cancel_returns_the_blocks() -> None:
    worker = Worker()
    worker.expect("a", prompt(60))
    worker.offer("a")
    worker.grant()
    worker.cancel("a")
    worker.fence("a", committed=True)
    worker.drain()


def test_a_grant_nobody_was_told_of_ends_with_its_attempt() -> None:
    worker = Worker()
    worker.expect("a", prompt(60))
    worker.offer("a")
    worker.decide()
    assert worker.scheduler.cancel("a", 0.0) is True
    del worker.decodes["a"]
    assert worker.scheduler.grants(0.0) == []
    worker.drain()


def outputs(asked: Request, worker: Worker) -> list[list[int]]:
    """What each choice says if it is written alone."""
    return [answer(asked, worker.groups, worker.longest, choice)[0] for choice in range(asked.sampling.n)]


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("length", [15, 16, 17, 33])
def test_choices_share_whole_blocks_and_copy_the_last(length: int, local: bool) -> None:
    worker = Worker(windows=(0, 24))
    worker.expect("a", prompt(length), local=local, n=3, max_tokens=20, ignore_eos=True)
    if local:
        worker.step()
        worker.step() if length == 33 else None
    else:
        worker.offer("a")
        worker.grant()
        worker.commit("a")
    decision = worker.decide()
    assert decision is not None
    assert [(row.start, len(row.token_ids)) for row in decision.batch.rows] == [(length, 1)] * 3, "each brings its own first token"
    whole, partial = divmod(length, BLOCK)
    assert len(decision.batch.copies) == (2 * 2 if partial else 0)
    assert decision.forked == (("a", "a") if partial else ())
    for tables in zip(*(row.tables for row in decision.batch.rows), strict=True):
        assert len({table[:whole] for table in tables}) == 1
        assert len({table[whole] for table in tables}) == 3
    worker.drain()
    assert [worker.tokens[name] for name in ("a", "a/1", "a/2")] == outputs(worker.finished_request("a"), worker)
    assert worker.finished["a"].recomputed_tokens == 0


def test_choice_0_says_what_one_choice_says() -> None:
    worker = Worker()
    worker.expect("one", prompt(20), local=True, max_tokens=30)
    worker.drain()
    worker.expect("many", prompt(20), local=True, max_tokens=30, n=4)
    worker.drain()
    assert worker.tokens["many"] == worker.tokens["one"]
    assert len({tuple(worker.tokens[name_of("many", choice)]) for choice in range(4)}) == 4


def test_choices_without_a_slot_wait_and_are_written_later() -> None:
    worker = Worker(max_running=2)
    worker.expect("a", prompt(20), local=True, n=5, max_tokens=12, ignore_eos=True)
    worker.step()
    assert worker.scheduler.load(0.0).running == 5
    decision = worker.step()
    assert decision is not None
    assert len(decision.batch.rows) == 2
    worker.drain()
    assert worker.finished["a"].recomputed_tokens == 3 * 5, "20 tokens and the first of the output, of which one block is cached"


def test_choices_without_a_block_wait_and_are_written_later() -> None:
    worker = Worker(windows=(0,), blocks=3, max_running=8)
    worker.expect("a", prompt(20), local=True, n=4, max_tokens=9, ignore_eos=True)
    worker.step()
    decision = worker.step()
    assert decision is not None
    assert len(decision.batch.rows) == 2, "one block for the prompt's beginning, and two for two choices' ends"
    worker.drain()


def test_one_choice_is_preempted_and_the_others_go_on() -> None:
    worker = Worker(windows=(0,), blocks=8, max_running=8)
    worker.expect("a", prompt(33), local=True, n=3, max_tokens=50, ignore_eos=True)
    worker.drain()
    assert 0 < worker.finished["a"].recomputed_tokens < 2 * 83


def test_choices_whose_prompt_was_thrown_out_while_they_were_drawn_wait_for_it() -> None:
    worker = Worker(windows=(0,), blocks=9, chunk_tokens=64)
    for attempt_id in ("old", "elder"):
        worker.expect(attempt_id, prompt(31, len(attempt_id)), local=True, max_tokens=60, ignore_eos=True)
    while len(worker.tokens["elder"]) < 17:
        worker.step()
    worker.expect("a", prompt(32), local=True, n=3, max_tokens=9, ignore_eos=True)
    drawing = worker.decide()
    assert drawing is not None
    assert [len(row.draws) for row in drawing.batch.rows] == [1, 1, 3]
    worker.decide()
    assert worker.pool.parts[0].fenced == 2, "both others open a block, and there was one"
    worker.run()
    worker.complete()
    worker.scheduler.check()
    assert [worker.tokens[name_of("a", choice)] for choice in range(3)] == [
        output[:1] for output in outputs(worker.decodes["a"].request, worker)
    ]
    worker.drain()


def test_a_choice_is_stopped_and_the_others_go_on() -> None:
    worker = Worker()
    worker.expect("a", prompt(20), local=True, n=3, max_tokens=12, ignore_eos=True)
    for _ in range(4):
        worker.step()
    worker.stop("a", 0)
    worker.stop("a", 7)
    decision = worker.decide()
    assert decision is not None
    assert [draw.choice for row in decision.batch.rows for draw in row.draws] == [1, 2]
    worker.drain()
    assert worker.ends.keys() == {"a/1", "a/2"}


@pytest.mark.parametrize("when", ["expected", "granted", "running"])
def test_when_every_choice_is_stopped_the_attempt_has_finished(when: str) -> None:
    worker = Worker()
    worker.expect("a", prompt(20), n=2, max_tokens=12, ignore_eos=True)
    if when == "expected":
        worker.stop("a", 0)
        worker.stop("a", 1)
    worker.offer("a")
    worker.grant()
    if when == "granted":
        worker.stop("a", 1)
        worker.stop("a", 0)
    worker.commit("a")
    if when == "running":
        worker.step()
        worker.stop("a", 0)
        assert "a" not in worker.finished
        worker.stop("a", 1)
    assert "a" in worker.finished
    worker.drain()


@pytest.mark.parametrize("local", [False, True])
def test_a_retry_computes_what_the_client_has_of_each_choice_and_no_ended_one(local: bool) -> None:
    worker = Worker(blocks=20)
    worker.expect("a", prompt(20), local=local, n=4, generated=[[5] * 18, [], [6], [7]], finished=[3], max_tokens=30, ignore_eos=True)
    worker.drain()
    assert worker.ends.keys() == {"a", "a/1", "a/2"}
    assert worker.tokens["a"][:18] == [5] * 18
    assert worker.finished["a"].recomputed_tokens == 18
    assert worker.finished["a"].local_prefill_tokens == (20 if local else 0)


@pytest.mark.parametrize("local", [False, True])
def test_a_retry_of_which_no_choice_opens_draws_nothing_behind_the_prompt(local: bool) -> None:
    worker = Worker()
    worker.expect("a", prompt(20), local=local, n=2, generated=[[5, 6], [7]], max_tokens=9, ignore_eos=True)
    if local:
        decision = worker.step()
        assert decision is not None
        assert [row.draws for row in decision.batch.rows] == [()]
    worker.drain()


def test_choices_that_end_at_once_are_told_once() -> None:
    worker = Worker()
    for attempt_id, local in (("far", False), ("here", True)):
        worker.expect(attempt_id, prompt(20), local=local, n=3, max_tokens=1, ignore_eos=True)
        worker.drain()
        assert [len(worker.tokens[name_of(attempt_id, choice)]) for choice in range(3)] == [1, 1, 1]


@settings(max_examples=100, deadline=None)
@example(
    lengths=[(40, 3)], windows=(24,), before=2, share=1.0, n=1, stages=1, waits=0
)  # a chunk has passed the position where a block leaves the window
@example(lengths=[(20, 30)], windows=(0, 24), before=1, share=1.0, n=3, stages=1, waits=0)  # blocks are still to be copied
@example(
    lengths=[(1, 2), (49, 2), (49, 2)], windows=(0,), before=4, share=1.0, n=1, stages=1, waits=0
)  # the last token of a prompt is not yet decoding
@example(lengths=[(40, 90)] * 3, windows=(0,), before=5, share=1.0, n=1, stages=2, waits=150)  # and nobody who waits fits
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(2, 90)), min_size=1, max_size=4),
    windows=st.sampled_from([(0,), (24,), (0, 24), (0, 5), (0, 16, 33)]),
    before=st.integers(0, 12),
    share=st.floats(0, 1),
    n=st.integers(1, 3),
    stages=st.integers(1, 4),
    waits=st.integers(0, 150),
)
def test_advance_is_that_many_rounds_of_single_steps(
    lengths: list[tuple[int, int]], windows: tuple[int, ...], before: int, share: float, n: int, stages: int, waits: int
) -> None:
    twins = [Worker(windows=windows, blocks=16, stages=stages) for _ in range(2)]
    for worker in twins:
        for i, (length, max_tokens) in enumerate(lengths):
            worker.expect(f"a{i}", prompt(length, i), local=True, max_tokens=max_tokens, ignore_eos=True, n=n if i == 0 else 1)
        for _ in range(before):
            worker.finish(len(worker.fill()))
        if waits:
            worker.expect("w", prompt(waits, 99), local=True, max_tokens=2)
            worker.grant()
    fast, slow = (worker.scheduler for worker in twins)
    rounds, rows = math.ceil(fast.steady() * share), fast.rows
    all_of_some = fast.advance(rounds, 7)
    advanced = fast.retire()
    assert all_of_some == bool(advanced.choices)
    choices: list[ChoiceFinished] = []
    finished: list[Finished] = []
    for _ in range(rounds):
        steps = twins[1].fill()
        twins[1].decided.clear()
        assert sum(len(step.attempts) for step in steps) == rows
        assert not finished, "steady no longer"
        for step in steps:
            outcome = slow.complete(StepOutput(step.batch.step, ((Drawn(7),),) * len(step.attempts)), 0.0)
            choices += outcome.choices
            finished += outcome.finished
            assert sorted(new.attempt_id for new in outcome.new_tokens for _ in new.tokens) == sorted(step.attempts)
    assert (advanced.choices, advanced.finished) == (tuple(choices), tuple(finished))
    for scheduler in (fast, slow):
        scheduler.check()  # joins what tables have taken to them, too
    assert state(fast) == state(slow)


def test_steady_ends_before_memory_does_and_while_others_could_start() -> None:
    worker = Worker(windows=(0,), blocks=8, context=10_000)
    for attempt_id in "ab":
        worker.expect(attempt_id, prompt(32, ord(attempt_id)), local=True, max_tokens=90, ignore_eos=True)
    assert worker.scheduler.steady() == 0, "prompts are still to be computed"
    while worker.scheduler.steady() == 0:
        worker.step()
    assert 24 <= worker.scheduler.steady() <= 32, "four blocks for two requests"
    worker.decide()
    assert worker.scheduler.steady() == 0, "a step is in flight"
    worker.run()
    worker.complete()
    worker.expect("c", prompt(60, 3), local=True, max_tokens=2)
    assert worker.scheduler.steady() == 0, "there is a seat, memory may come"
    with pytest.raises(ValueError, match="steady"):
        worker.scheduler.advance(1, 7)
    worker.drain()


def state(scheduler: object) -> str:
    """Everything a scheduler holds, object identities aside, and what it only remembers having seen."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return [(plain(key), plain(item)) for key, item in value.items()]
        if isinstance(value, list | tuple | deque):
            return [plain(item) for item in value]
        if isinstance(value, Steady):
            return None
        if isinstance(value, BlockPool):
            return [plain(vars(part)) for part in value.parts]
        if type(value).__module__.startswith("diptych.") and not callable(value):
            names = vars(value) if hasattr(value, "__dict__") else {n: getattr(value, n) for n in value.__slots__}  # type: ignore[attr-defined]
            return [(name, plain(item)) for name, item in names.items() if name != "pool"]
        return value if isinstance(value, int | float | str | bytes | None) else repr(value) if isinstance(value, frozenset | set) else None

    return repr(plain(vars(scheduler)))

"""The decode scheduler: all of its rules at once, against a fake engine and fake transfers."""

from __future__ import annotations

from decode_harness import CONTEXT, Worker, prompt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from step_rules import StepRules


class Decodes(StepRules):
    """Transfers and local prompts, steps (several in flight, run late), failures and cancels at any time."""

    depth = 3
    """Most steps in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.worker = Worker()
        self.count = 0

    @rule(
        family=st.integers(1, 3),
        length=st.integers(1, CONTEXT - 1),
        local=st.booleans(),
        max_tokens=st.integers(1, 120),
        generated=st.lists(st.integers(0, 20), min_size=1, max_size=4),
        resumed=st.booleans(),
        finished=st.sets(st.integers(0, 3)),
    )
    def expect(
        self, family: int, length: int, local: bool, max_tokens: int, generated: list[int], resumed: bool, finished: set[int]
    ) -> None:
        n = len(generated)
        had = [min(count, max_tokens - 1, length - 1) for count in generated] if resumed else [0]
        ids = prompt(length, family)
        cut = length - max(had)
        sampling = {"max_tokens": max_tokens, "ignore_eos": family == 2, "n": n}
        if resumed:  # of choices that ended something else may be known
            finished = finished & set(range(n)) if finished & set(range(n)) != set(range(n)) else set()
            sampling |= {"generated": [ids[cut : cut + count] for count in had], "finished": sorted(finished)}
        sampling |= {"min_tokens": max_tokens // 3, "repetition_penalty": 1.0 + self.count % 2}
        self.worker.expect(f"a{self.count}", ids[:cut], local=local, **sampling)
        self.count += 1

    @precondition(lambda self: self.worker.decodes.keys() - self.worker.finished.keys())
    @rule(data=st.data(), choice=st.integers(0, 3))
    def stop(self, data: st.DataObject, choice: int) -> None:
        alive = self.worker.decodes.keys() - self.worker.finished.keys()
        self.worker.stop(data.draw(st.sampled_from(sorted(alive))), choice)

    @precondition(lambda self: self.worker.expected)
    @rule(data=st.data())
    def offer(self, data: st.DataObject) -> None:
        self.worker.offer(data.draw(st.sampled_from(sorted(self.worker.expected))))

    @rule()
    def grant(self) -> None:
        self.worker.grant()

    @precondition(lambda self: self.worker.offered)
    @rule(data=st.data())
    def nearly_done(self, data: st.DataObject) -> None:
        self.worker.scheduler.nearly_done(data.draw(st.sampled_from(sorted(self.worker.offered))), self.worker.now)

    @precondition(lambda self: self.worker.granted)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.worker.commit(data.draw(st.sampled_from(sorted(self.worker.granted))))

    @precondition(lambda self: self.worker.expected | self.worker.offered | self.worker.granted.keys())
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.worker.grant()
        transfers = self.worker.expected | self.worker.offered | self.worker.granted.keys()
        self.worker.lose(data.draw(st.sampled_from(sorted(transfers))))

    @precondition(lambda self: self.worker.lost)
    @rule(data=st.data(), committed=st.booleans())
    def fence(self, data: st.DataObject, committed: bool) -> None:
        self.worker.fence(data.draw(st.sampled_from(sorted(self.worker.lost))), committed=committed)

    @precondition(lambda self: self.worker.decodes.keys() - self.worker.finished.keys())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.worker.grant()
        alive = self.worker.decodes.keys() - self.worker.finished.keys()
        self.worker.cancel(data.draw(st.sampled_from(sorted(alive))))

    @rule(count=st.integers(1, 60), joins=st.booleans(), data=st.data())
    def steps(self, count: int, joins: bool, data: st.DataObject) -> None:
        depth = data.draw(st.integers(1, self.depth))
        for _ in range(count):
            self.worker.grant()
            if joins:
                self.worker.join()
            if len(self.worker.decided) < depth:
                self.worker.decide()
            if len(self.worker.outputs) < len(self.worker.decided):
                self.worker.run()
            if len(self.worker.outputs) and len(self.worker.decided) >= depth:
                self.worker.complete()
            self.worker.scheduler.check()

    @precondition(lambda self: len(self.worker.outputs) < len(self.worker.decided))
    @rule()
    def join(self) -> None:
        self.worker.join()

    @invariant()
    def sound(self) -> None:
        self.worker.scheduler.check()

    def teardown(self) -> None:
        self.worker.drain()


TestDecodes = Decodes.TestCase
TestDecodes.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


class DecodesInStages(Decodes):
    """The same where a pipeline has several stages, with up to one step more in flight than that."""

    @initialize(stages=st.integers(2, 4), blocks=st.integers(11, 30), max_running=st.integers(1, 7))
    def set_up(self, stages: int, blocks: int, max_running: int) -> None:
        self.worker = Worker(stages=stages, blocks=blocks, max_running=max_running)
        self.depth = stages + 1


TestDecodesInStages = DecodesInStages.TestCase
TestDecodesInStages.settings = settings(max_examples=25, stateful_step_count=50, deadline=None)

"""A decode worker without shells, for every test of its scheduler."""

from __future__ import annotations

from collections import deque

from diptych.core.commands import Decode, Finished
from diptych.core.request import FinishReason, Request, Token
from diptych.core.transfer import GroupGrant
from diptych.decode_worker.choices import DecodeOutcome
from diptych.decode_worker.decision import Decision
from diptych.decode_worker.scheduler import DecodeScheduler
from diptych.engine.batch import NO_BLOCK, StepOutput
from diptych.engine.block_pool import BlockPool
from fake_engine import BLOCK, EOS, FakeEngine, answer, digests, draw, groups, hashes_of, request

CONTEXT = 160


class Worker:
    """A decode worker without shells: scheduler, fake engine, a source that fills what is granted, what came of each attempt."""

    def __init__(
        self,
        *,
        windows: tuple[int, ...] = (0, 24),
        blocks: int = 14,
        chunk_tokens: int = 32,
        max_running: int = 4,
        context: int = CONTEXT,
        watermark: float = 0.05,
        stages: int = 1,
    ) -> None:
        self.groups = groups(*windows)
        counts = (blocks,) * len(windows)
        self.pool = BlockPool(counts, self.groups, BLOCK)
        self.longest = min(context, self.pool.longest(chunk_tokens))
        self.engine = FakeEngine(self.groups, counts, max_running)
        self.scheduler = DecodeScheduler(
            self.pool,
            hashes_of=hashes_of,
            chunk_tokens=chunk_tokens,
            max_running=max_running,
            max_context=context,
            eos_token_ids=EOS,
            watermark=watermark,
            stages=stages,
        )
        self.stages = stages
        self.decided: deque[Decision] = deque()
        self.outputs: deque[StepOutput] = deque()
        self.decodes: dict[str, Decode] = {}
        self.expected: set[str] = set()
        self.offered: set[str] = set()
        self.granted: dict[str, tuple[GroupGrant, ...]] = {}
        self.lost: dict[str, tuple[GroupGrant, ...]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, FinishReason] = {}
        self.stopped: set[str] = set()
        self.finished: dict[str, Finished] = {}
        self.context = context
        self.now = 0.0

    def expect(self, attempt_id: str, token_ids: list[int], *, local: bool = False, **sampling: object) -> None:
        decode = Decode(attempt_id, request(token_ids, **sampling), local)
        self.scheduler.expect(decode, self.now)
        self.decodes[attempt_id] = decode
        for choice in decode.request.live:
            self.tokens[name_of(attempt_id, choice)] = list(decode.request.generated_by(choice))
        if not local:
            self.expected.add(attempt_id)

    def offer(self, attempt_id: str) -> None:
        self.expected.remove(attempt_id)
        assert self.scheduler.on_offer(attempt_id, len(self.decodes[attempt_id].request.token_ids), self.now) is None
        self.offered.add(attempt_id)

    def grant(self) -> list[str]:
        grants = self.scheduler.grants(self.now)
        for attempt_id, blocks in grants:
            self.offered.remove(attempt_id)
            self.granted[attempt_id] = blocks
            self._check_grant(attempt_id, blocks)
        return [attempt_id for attempt_id, _ in grants]

    def _check_grant(self, attempt_id: str, grants: tuple[GroupGrant, ...]) -> None:
        end = len(self.decodes[attempt_id].request.token_ids)
        for group, grant in zip(self.groups, grants, strict=True):
            assert grant.first_position % BLOCK == 0
            assert NO_BLOCK not in grant.blocks
            assert grant.first_position >= group.first_needed(end) // BLOCK * BLOCK, "only what the window will show is sent"
            assert len(grant.blocks) == max(0, -(-(end - grant.first_position) // BLOCK))

    def copy(self, attempt_id: str, grants: tuple[GroupGrant, ...], *, garbage: bool = False) -> None:
        """Copy the prompt's KV into the granted blocks."""
        values = digests(self.decodes[attempt_id].request.token_ids)
        for g, grant in enumerate(grants):
            for position in range(grant.first_position, len(values)):
                block = grant.blocks[(position - grant.first_position) // BLOCK]
                self.engine.cells[g, block, position % BLOCK] = (-1, 0) if garbage else (position, values[position])

    def commit(self, attempt_id: str) -> None:
        self.copy(attempt_id, self.granted[attempt_id])
        del self.granted[attempt_id]
        asked = self.decodes[attempt_id].request
        self._take(self.scheduler.committed(attempt_id, tuple(self._first(attempt_id, choice) for choice in asked.opening), self.now))

    def _first(self, attempt_id: str, choice: int) -> Token:
        """As a source draws it, and tells the router if it is the end."""
        asked = self.decodes[attempt_id].request
        values, end = digests(asked.token_ids), len(asked.token_ids) - 1
        seen = [values[group.first_needed(end) :] for group in self.groups]
        token = Token(
            len(asked.generated_by(choice)), draw(self.groups, seen, asked.sampling, len(asked.generated_by(choice)), choice), choice=choice
        )
        if token.id in asked.sampling.ends(frozenset(EOS)):
            self._end(attempt_id, choice, FinishReason.STOP)
            return token
        self.tokens[name_of(attempt_id, choice)].append(token.id)
        if token.index + 1 >= asked.sampling.max_tokens or end + 2 >= self.context:
            self._end(attempt_id, choice, FinishReason.LENGTH)
        return token

    def lose(self, attempt_id: str) -> None:
        """The transfer fails before its commit."""
        assert self.scheduler.transfer_failed(attempt_id, self.now)
        self._forget(attempt_id)

    def _forget(self, attempt_id: str) -> None:
        self.expected.discard(attempt_id)
        self.offered.discard(attempt_id)
        if attempt_id in self.granted:
            self.lost[attempt_id] = self.granted.pop(attempt_id)
        del self.decodes[attempt_id]

    def cancel(self, attempt_id: str) -> None:
        transfer = attempt_id in self.expected | self.offered | self.granted.keys()
        assert self.scheduler.cancel(attempt_id, self.now) == transfer
        if attempt_id in self.granted:
            self.copy(attempt_id, self.granted[attempt_id], garbage=True)
        self._forget(attempt_id)

    def fence(self, attempt_id: str, *, committed: bool = False) -> None:
        """Until now the source may have written anything there."""
        for g, grant in enumerate(self.lost.pop(attempt_id)):
            for block in grant.blocks:
                for offset in range(BLOCK):
                    self.engine.cells[g, block, offset] = (-1, 0)
        if committed:
            assert self.scheduler.committed(attempt_id, (Token(0, 1),), self.now) == DecodeOutcome()
        else:
            self.scheduler.fenced(attempt_id, self.now)

    def decide(self) -> Decision | None:
        decoding = [(sequence, sequence.table) for sequence in self.scheduler._roster.running if sequence.decoding]
        decision = self.scheduler.decide(self.now)
        if decision is not None:
            users = {slot: name for step in self.decided for slot, name in slots_of(step)}
            for slot, name in slots_of(decision):
                assert users.get(slot, name) == name, "a slot in flight belongs to another"
            still = {sequence.slot for sequence, table in decoding if sequence.table is table}  # else preempted, and perhaps begun again
            self._check_stages(decision, still, len(decoding))
            self.decided.append(decision)
        return decision

    def join(self) -> bool:
        """Let what has come since go with the step decided last, if that has not begun; whether anything did."""
        if len(self.outputs) == len(self.decided):
            return False
        before = self.decided[-1]
        joined = self.scheduler.join(before)
        if joined is None:
            return False
        assert joined.batch.rows[: len(before.batch.rows)] == before.batch.rows, "what was decided stays"
        assert len(joined.batch.rows) > len(before.batch.rows)
        assert joined.attempts == (*before.attempts, *joined.attempts[len(before.attempts) :])
        assert len({row.slot for row in joined.batch.rows}) == len(joined.batch.rows) == len(joined.attempts)
        self.decided[-1] = joined
        return True

    def _check_stages(self, decision: Decision, decoding: set[int], count: int) -> None:
        """`decoding`: slots of the `count` sequences that decode."""
        assert sum(row.slot in decoding for row in decision.batch.rows) <= -(-count // self.stages), "more than its share"
        if self.stages > 1:
            drawing = {row.slot for step in self.decided for row in step.batch.rows if row.draws}
            assert not drawing & {row.slot for row in decision.batch.rows}, "a sequence with a token in flight is in another step"
            assert all(row.token_ids for row in decision.batch.rows), "a token is not known"

    def fill(self) -> list[Decision]:
        """Decide until every stage has a step, as the loop does; the steps decided."""
        decided = []
        while len(self.decided) < self.stages and (decision := self.decide()) is not None:
            decided.append(decision)
        return decided

    def finish(self, steps: int = 1) -> None:
        """Run and complete the oldest steps in flight."""
        for _ in range(steps):
            if not self.outputs:
                self.run()
            self.complete()

    def run(self) -> None:
        self.outputs.append(self.engine.run(self.decided[len(self.outputs)].batch))

    def complete(self) -> None:
        self.decided.popleft()
        self._take(self.scheduler.complete(self.outputs.popleft(), self.now))

    def step(self) -> Decision | None:
        decision = self.decide()
        if decision is not None:
            self.run()
            self.complete()
        return decision

    def _take(self, outcome: DecodeOutcome) -> None:
        for new in outcome.new_tokens:
            assert new.attempt_id in self.decodes, "nothing after the end"
            assert new.attempt_id not in self.finished, "nothing after the end"
            for token in new.tokens:
                name = name_of(new.attempt_id, token.choice)
                assert name not in self.ends.keys() | self.stopped, "nothing after the end"
                assert token.index == len(self.tokens[name])
                self.tokens[name].append(token.id)
        for ended in outcome.choices:
            self._end(ended.attempt_id, ended.choice, ended.finish)
        for finished in outcome.finished:
            assert finished.attempt_id not in self.finished, "one end"
            self.finished[finished.attempt_id] = finished
            names = {name_of(finished.attempt_id, choice) for choice in self.decodes[finished.attempt_id].request.live}
            assert names <= self.ends.keys() | self.stopped, "it ended before its choices"

    def _end(self, attempt_id: str, choice: int, finish: FinishReason) -> None:
        name = name_of(attempt_id, choice)
        if name in self.stopped:
            return  # by the source, which heard of no stop
        assert name not in self.ends, "one end"
        self.ends[name] = finish
        expected = answer(self.decodes[attempt_id].request, self.groups, self.longest, choice)
        assert (self.tokens[name], finish) == expected

    def stop(self, attempt_id: str, choice: int) -> None:
        self.stopped.add(name_of(attempt_id, choice))
        self._take(self.scheduler.stop(attempt_id, choice, self.now))

    def finished_request(self, attempt_id: str) -> Request:
        assert attempt_id in self.finished
        return self.decodes[attempt_id].request

    def drain(self) -> None:
        """Let everything go through. Whoever is left starves."""
        idle = 0
        while idle < 3:
            idle += 1
            for attempt_id in list(self.expected):
                self.offer(attempt_id)
            for attempt_id in list(self.lost):
                self.fence(attempt_id)
            for attempt_id in (*self.grant(), *list(self.granted)):
                if attempt_id in self.granted:
                    self.commit(attempt_id)
            self.scheduler.check()
            if self.decided:
                if not self.outputs:
                    self.run()
                self.complete()
                idle = 0
            elif self.decide() is not None:
                idle = 0
        assert self.finished.keys() >= self.decodes.keys(), "an attempt starved"
        load = self.scheduler.load(self.now)
        assert (load.waiting, load.running, load.leases, load.prompt_tokens_waiting) == (0, 0, 0, 0)
        assert load.blocks_free == load.blocks_total
        self.scheduler.check()
        assert self.pool.unused


def slots_of(decision: Decision) -> list[tuple[int, str]]:
    return [(row.slot, name) for name, row in zip(decision.attempts, decision.batch.rows, strict=True)]


def name_of(attempt_id: str, choice: int) -> str:
    return f"{attempt_id}/{choice}" if choice else attempt_id


def prompt(length: int, family: int = 1) -> list[int]:
    """Prompts of one family share what they have in common."""
    return [1 + (family * 7 + i * i) % 38 for i in range(length)]

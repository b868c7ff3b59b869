"""Both schedulers together: prompts computed on one fake engine, copied piece by piece, decoded on another."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

import pytest
from diptych.core.commands import Decode, Prefill
from diptych.core.request import Request, Token
from diptych.core.transfer import GroupGrant
from diptych.decode_worker.choices import DecodeOutcome
from diptych.decode_worker.scheduler import DecodeScheduler
from diptych.engine.batch import Batch, StepOutput
from diptych.engine.block_pool import BlockPool
from diptych.prefill_worker.scheduler import PrefillScheduler
from fake_engine import BLOCK, EOS, FakeEngine, answer, digests, groups, hashes_of, request

CONTEXT = 150
Tables = tuple[tuple[int, ...], ...]


@dataclass
class Transfer:
    """One attempt on its way. `stretches`: what the source has computed and not yet copied."""

    request: Request
    offered: bool = False
    offer_seen: bool = False
    granted: tuple[GroupGrant, ...] | None = None
    stretches: deque[tuple[int, int, Tables]] = field(default_factory=deque)
    firsts: tuple[Token, ...] | None = None
    output: dict[int, list[int]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    source_ended: bool = False
    committed: bool = False
    dead: bool = False
    done: bool = False


class Pair:
    """A prefill and a decode worker. Every call of `play` does one random thing that could happen next."""

    def __init__(self, random: Random, windows: tuple[int, ...]) -> None:
        self.random, self.groups = random, groups(*windows)
        blocks = (12,) * len(windows)
        pools = [BlockPool(blocks, self.groups, BLOCK) for _ in range(2)]
        self.pools = pools
        self.engines = [FakeEngine(self.groups, blocks, 4) for _ in range(2)]
        common = {"hashes_of": hashes_of, "chunk_tokens": 32, "max_running": 4, "max_context": CONTEXT, "eos_token_ids": EOS}
        self.p = PrefillScheduler(pools[0], **common)  # type: ignore[arg-type]
        self.d = DecodeScheduler(pools[1], **common)  # type: ignore[arg-type]
        self.in_flight: tuple[deque[Batch], deque[Batch]] = (deque(), deque())
        self.names: deque[tuple[str, ...]] = deque()
        self.outputs: tuple[deque[StepOutput], deque[StepOutput]] = (deque(), deque())
        self.transfers: dict[str, Transfer] = {}

    def open(self) -> None:
        name = f"t{len(self.transfers)}"
        family, length = self.random.randint(1, 2), self.random.choice([15, 16, 17, 33, self.random.randint(1, CONTEXT - 1)])
        max_tokens = self.random.randint(2, 60)
        n = self.random.choice([1, 1, 2, 4])
        sampling = {
            "n": n,
            "max_tokens": max_tokens,
            "min_tokens": self.random.randint(0, max_tokens),
            "presence_penalty": float(length % 2),
        }
        asked = request([1 + (family * 7 + i * i) % 38 for i in range(length)], **sampling)
        self.transfers[name] = Transfer(asked, output={choice: list(asked.generated_by(choice)) for choice in range(n)})
        self.p.add(Prefill(name, asked, "d"), 0.0)
        self.d.expect(Decode(name, asked), 0.0)

    def play(self) -> None:
        name = self.random.choice(list(self.transfers)) if self.transfers else None
        moves = [self.p_decide, self.d_decide, self.p_decide, self.d_decide]
        moves += [lambda: self.run(0), lambda: self.run(1), self.p_complete, self.d_complete]
        self.random.choice(moves)()
        if name is not None:
            self.random.choice([self.lane, self.copy, self.copy, self.commit])(name)

    def p_decide(self) -> None:
        if len(self.in_flight[0]) < 2 and (decision := self.p.decide(0.0)) is not None:
            self.in_flight[0].append(decision.batch)
            self.names.append(decision.attempts)
            for started in decision.started:
                transfer = self.transfers[started.attempt_id]
                transfer.offered = True
                transfer.stretches.append((0, started.cached_tokens, started.tables))

    def d_decide(self) -> None:
        if len(self.outputs[1]) < len(self.in_flight[1]) and (joined := self.d.join(self.decided)) is not None:
            self.decided, self.in_flight[1][-1] = joined, joined.batch
        if len(self.in_flight[1]) < 2 and (decision := self.d.decide(0.0)) is not None:
            self.decided = decision
            self.in_flight[1].append(decision.batch)

    def run(self, side: int) -> None:
        if len(self.outputs[side]) == len(self.in_flight[side]):
            return
        batch = self.in_flight[side][len(self.outputs[side])]
        if side == 0:
            for name, row in zip(self.names.popleft(), batch.rows, strict=True):
                self.transfers[name].stretches.append((row.start, row.start + row.length, row.tables))
        self.outputs[side].append(self.engines[side].run(batch))

    def p_complete(self) -> None:
        if self.outputs[0]:
            self.in_flight[0].popleft()
            for first in self.p.complete(self.outputs[0].popleft(), 0.0).first_tokens:
                transfer = self.transfers[first.attempt_id]
                transfer.firsts = first.tokens
                for token, finish in zip(first.tokens, first.finishes, strict=True):
                    if token.id not in EOS:
                        transfer.output[token.choice].append(token.id)
                    if finish is not None:
                        transfer.ended.add(token.choice)
                if len(transfer.ended) == transfer.request.sampling.n:
                    self._end(first.attempt_id)
                    self.kill(first.attempt_id)

    def d_complete(self) -> None:
        if self.outputs[1]:
            self.in_flight[1].popleft()
            self._take(self.d.complete(self.outputs[1].popleft(), 0.0))

    def _take(self, outcome: DecodeOutcome) -> None:
        for new in outcome.new_tokens:
            for token in new.tokens:
                self.transfers[new.attempt_id].output[token.choice].append(token.id)
        for ended in outcome.choices:
            assert ended.choice not in self.transfers[ended.attempt_id].ended, "one end"
            self.transfers[ended.attempt_id].ended.add(ended.choice)
        for finished in outcome.finished:
            self._end(finished.attempt_id)

    def _end(self, name: str) -> None:
        transfer = self.transfers[name]
        assert not transfer.done, "one end"
        assert not transfer.dead, "nothing after the end"
        transfer.done = True
        assert len(transfer.ended) == transfer.request.sampling.n, "every choice has ended before"
        for choice, output in transfer.output.items():
            assert output == answer(transfer.request, self.groups, CONTEXT, choice)[0]

    def lane(self, name: str) -> None:
        transfer = self.transfers[name]
        if transfer.offered and not transfer.offer_seen and not transfer.dead:
            transfer.offer_seen = True
            assert self.d.on_offer(name, len(transfer.request.token_ids), 0.0) is None
        for granted, blocks in self.d.grants(0.0):
            self.transfers[granted].granted = blocks
            self.p.granted(granted)

    def copy(self, name: str) -> None:
        transfer = self.transfers[name]
        if transfer.granted is None or not transfer.stretches or transfer.source_ended:
            return
        start, stop, tables = transfer.stretches.popleft()
        values = digests(transfer.request.token_ids)
        for g, grant in enumerate(transfer.granted):
            for position in range(max(start, grant.first_position), stop):
                cell = self.engines[0].cells[self.engines[0].place(g, tables[g], position)]
                assert cell == (position, values[position]), "the source's blocks are intact until the transfer ends"
                block = grant.blocks[(position - grant.first_position) // BLOCK]
                self.engines[1].cells[g, block, position % BLOCK] = cell

    def commit(self, name: str) -> None:
        transfer = self.transfers[name]
        if transfer.dead:
            self.fence(name)
        elif transfer.firsts is not None and transfer.granted is not None and not transfer.stretches and not transfer.committed:
            transfer.committed = transfer.source_ended = True
            self._take(self.d.committed(name, transfer.firsts, 0.0))
            self.p.release(name, 0.0)

    def kill(self, name: str) -> None:
        """A cancel or a failure, at any time; copies go on until the fence."""
        transfer = self.transfers[name]
        if not transfer.dead:
            transfer.dead = True
            self.p.cancel(name, 0.0)
            self.d.cancel(name, 0.0)

    def fence(self, name: str) -> None:
        transfer = self.transfers[name]
        if not transfer.source_ended:
            transfer.source_ended = True
            self.p.release(name, 0.0)
            self.d.fenced(name, 0.0)

    def check(self) -> None:
        self.p.check()
        self.d.check()


@pytest.mark.parametrize("windows", [(0,), (0, 24), (40, 7)])
@pytest.mark.parametrize("seed", range(8))
def test_every_request_is_answered_as_if_alone(seed: int, windows: tuple[int, ...]) -> None:
    random = Random(seed)
    pair = Pair(random, windows)
    for turn in range(2500):
        if turn < 1500 and turn % 60 == 0:
            pair.open()
        if random.random() < 0.01 and pair.transfers:
            pair.kill(random.choice(list(pair.transfers)))
        pair.play()
        if turn % 5 == 0:
            pair.check()
    for _ in range(20_000):
        if all(transfer.done or transfer.dead for transfer in pair.transfers.values()):
            break
        pair.play()
    assert all(transfer.done or transfer.dead for transfer in pair.transfers.values()), "a request starved"
    assert sum(transfer.done for transfer in pair.transfers.values()) >= 5
    for name, transfer in pair.transfers.items():
        if transfer.dead:
            pair.fence(name)
    while any(pair.in_flight):
        pair.run(0)
        pair.run(1)
        pair.p_complete()
        pair.d_complete()
    pair.check()
    assert all(pool.unused for pool in pair.pools)

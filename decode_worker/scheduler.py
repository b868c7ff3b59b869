"""Which tokens a decode worker draws next, and to whom it lends memory. Pure: events in, decisions out; times are passed in.

    expect ─┬─ transfer: expected ──on_offer──▶ queued ──grants──▶ granted ──committed──▶ running ──▶ finished
            └─ local prefill: ───────────────▶ queued ──decide──────────────────────────▶ running ──▶ finished
                                                                  preempted ◀── memory ──────┘ └──▶ (recomputed)

An attempt is one sequence until what its choices share is computed, and from then on one sequence for each choice: they share whole
blocks, and the last, partial one is copied. A choice that finds no block or no slot for that waits as a preempted one does.

Memory goes first to the growth of running requests (a watermark is kept for it), then to preempted ones, then to the queue
in order, where a smaller may pass a larger a bounded number of times. Below the watermark a transfer is granted only when its
source has said that it is nearly done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from ..core.commands import ChoiceFinished, Decode, Finished
from ..core.errors import InvalidRequest
from ..core.fleet import Measure
from ..core.request import FinishReason, Request, Token
from ..core.transfer import GroupGrant, RefusedReason
from ..engine.batch import Batch, StepOutput
from ..engine.block_pool import BlockPool, BlockTable
from ..engine.slots import Slots
from ..worker.load import Load, measures
from .admission import Admission
from .branches import Branches
from .choices import DecodeOutcome, Said, part, tokens_of
from .decision import Decision, Draft
from .growth import Growth
from .roster import Roster
from .rows import Rows
from .sequence import Sequence, sequence_of
from .steady import Steady
from .totals import Totals

Members = tuple[tuple[Sequence, BlockTable], ...]
"""Those in a step, and their blocks when it was decided."""


class DecodeScheduler:
    """Continuous batching; prompts are computed in chunks of `chunk_tokens` positions a step (over all rows) beside the decodes.

    `max_running`: slots of the engine; choices running and transfers granted. `watermark`: share of each group's blocks kept free of
    new work for the growth of what runs. `step` counts from 0, as the engine does. Attempt id and transfer id are the same.

    `stages`: how many steps the engine's pipeline computes at once. With one, a sequence may be in the next step before its last token
    is known. With several it is not, and a step takes at most ceil(n / stages) of the n that decode, the oldest that are in no step, so
    that `stages` steps in flight share them evenly. If the loop keeps that many in flight, a sequence with its blocks is left out by
    fewer than `stages` steps in a row (twice that, where several complete at once), as long as those older than it stay the same: so
    many steps in flight hold more than these.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        hashes_of: Callable[[Request, Seq[int]], list[bytes]],
        chunk_tokens: int,
        max_running: int,
        max_context: int,
        eos_token_ids: tuple[int, ...],
        watermark: float = 0.05,
        stages: int = 1,
    ) -> None:
        self._pool = pool
        self._hashes_of = hashes_of
        self._chunk_tokens = chunk_tokens
        self._max_context = max_context
        self._longest = min(max_context, pool.longest(chunk_tokens))
        self._eos_token_ids = frozenset(eos_token_ids)
        self._slots = Slots(max_running)
        self._admission = Admission(pool, chunk_tokens=chunk_tokens, watermark=watermark)
        self._leases = self._admission.leases
        self._expected: dict[str, Sequence] = {}
        self._roster = Roster()
        self._in_flight: deque[tuple[Batch, Members, Draft]] = deque()
        self._step = 0
        self._stages = stages
        self._short = False
        self._totals = Totals()
        self._branches = Branches(pool, self._roster, self._admission, hashes_of)
        self._growth = Growth(pool, self._slots, self._roster, self._admission, self._totals)
        self._rows = Rows(self._growth, self._totals, pool.block_size, stages)
        self._steady = Steady(pool, self._roster, self._slots, self._growth)

    def expect(self, decode: Decode, now: float) -> None:
        """An attempt: its transfer will be offered, or (`local_prefill`) it is queued at once. Raises `ContextExceeded` if it can
        never fit, `InvalidRequest` if its prompt is empty, it has nothing left to write, or its id is in use."""
        attempt_id = decode.attempt_id
        waiting = attempt_id in self._expected or attempt_id in self._admission.queue
        if waiting or attempt_id in self._leases or attempt_id in self._roster.started:
            raise InvalidRequest(f"Attempt {attempt_id} is under way.", field="attempt_id")
        sequence = sequence_of(decode, self._pool, self._hashes_of, longest=self._longest, eos=self._eos_token_ids)
        if decode.local_prefill:
            self._admission.enqueue(sequence)
        else:
            self._expected[attempt_id] = sequence

    def on_offer(self, transfer_id: str, prompt_tokens: int, now: float) -> RefusedReason | None:
        """Queue an offered transfer for a grant. A reason: refuse it (CLOSED: no such attempt any more; FAILED: the offer is not
        about this attempt's prompt, and the loop fails the attempt with `transfer_failed`)."""
        if (sequence := self._expected.get(transfer_id)) is None:
            return RefusedReason.CLOSED
        if prompt_tokens != len(sequence.tokens):
            return RefusedReason.FAILED
        self._admission.enqueue(self._expected.pop(transfer_id))
        return None

    def nearly_done(self, transfer_id: str, now: float) -> None:
        """Its source will soon have it whole: it may be granted below the watermark. Unknown ids are ignored."""
        self._admission.nearly_done(transfer_id)

    def grants(self, now: float) -> list[tuple[str, tuple[GroupGrant, ...]]]:
        """Transfers to grant now, with their blocks; call after every message and every completed step. While a running request waits
        for blocks nobody is given any before the next `decide` has looked whether they have come."""
        if not self._short and self._admission.waiting:
            self._admit()
        return self.new_grants()

    def new_grants(self) -> list[tuple[str, tuple[GroupGrant, ...]]]:
        """Those that `decide` has made by the way; call after it."""
        return self._admission.new_grants()

    def opening(self, transfer_id: str) -> tuple[int, ...] | None:
        """The choices of which a Commit must bring the first token; None if the transfer is not granted (any more)."""
        sequence = self._leases.get(transfer_id)
        return sequence.request.opening if sequence else None

    def committed(self, transfer_id: str, first_tokens: tuple[Token, ...], now: float, lacking: tuple[int, ...] = ()) -> DecodeOutcome:
        """The KV is here: decode from the next step. `first_tokens`: one for each choice that is `opening`. `lacking`: as
        `BlockTable.publish`. The outcome is empty unless they end every choice, or one for a reason that the source does not know. For an
        attempt cancelled meanwhile the blocks return (no `fenced` follows a commit)."""
        if (sequence := self._leases.commit(transfer_id)) is None:
            return DecodeOutcome()
        sequence.decided = sequence.done = sequence.target = len(sequence.tokens)
        sequence.table.publish(sequence.tokens, sequence.done, lacking)
        self._run(sequence)
        said = Said()
        self._part(sequence, first_tokens, said, told=True)
        if not sequence.ended:
            self._steady.join(sequence)
        return said.outcome()

    def _part(self, trunk: Sequence, first_tokens: Seq[Token], said: Said, *, told: bool) -> None:
        """What the choices share is done: each goes its own way behind it, with its first token or with what the client has of it.
        `told`: the router knows these tokens, and what they end, from the source."""
        trunk.shared, shared = False, len(trunk.tokens)
        left = part(trunk, first_tokens, self._max_context, said, told=told)
        if not left:
            self._end(trunk, said)
            return
        trunk.choice, trunk.tokens = left[0]
        trunk.resume(shared)
        for choice, tokens in left[1:]:
            self._branches.open(trunk, shared, choice, tokens, seated=self._seats() > 0)

    def stop(self, attempt_id: str, choice: int, now: float) -> DecodeOutcome:
        """This choice is over, without an event of its own. The outcome is empty unless it was the last. Unknown ones are ignored."""
        self._steady.settle()
        said = Said()
        waiting = self._expected.get(attempt_id) or self._admission.queue.get(attempt_id) or self._leases.get(attempt_id)
        if waiting is not None:
            waiting.shared = True
            waiting.stopped.add(choice)
        for sequence in tuple(self._roster.started.get(attempt_id, ())):
            if sequence.shared:
                sequence.stopped.add(choice)
            elif sequence.choice == choice:
                self._end(sequence, said)
        return said.outcome()

    def movable(self) -> list[str]:
        """Attempts that lose nothing here: those that wait for memory, or for an Offer."""
        return [*self._expected, *self._admission.queue]

    def transfer_failed(self, transfer_id: str, now: float) -> bool:
        """The transfer will not commit: the attempt is over. Granted blocks stay held until `fenced`. True if the attempt was alive,
        so that the loop owes the router a `Failed`."""
        sequence = self._expected.pop(transfer_id, None)
        if sequence is not None:
            sequence.table.close()
        else:
            sequence = self._admission.withdraw(transfer_id)
        if sequence is None:
            return False
        sequence.ended = True
        return True

    def fenced(self, transfer_id: str, now: float) -> None:
        """No copy can touch the granted blocks any more: they return. Unknown ids (never granted, committed) are ignored."""
        self._leases.fenced(transfer_id)

    def cancel(self, attempt_id: str, now: float) -> bool:
        """Compute nothing more of it. True if its transfer is still under way (the loop cancels it at the destination; granted
        blocks stay held until `fenced`, or `committed` if that was faster); False otherwise (unknown ids included)."""
        if attempt_id in self._roster.started:
            self._steady.settle()
            for sequence in tuple(self._roster.started[attempt_id]):
                self._end(sequence, Said())
            return False
        queued = self._admission.queue.get(attempt_id)
        local = queued is not None and queued.local_prefill
        return (self.transfer_failed(attempt_id, now) and not local) or attempt_id in self._leases

    def decide(self, now: float) -> Decision | None:
        """The next step, or None if nothing can be computed before something else happens. May be called with steps in flight: a
        row whose last token is not yet known has empty `token_ids`."""
        self._steady.settle()
        decoding = sum([sequence.decoding for sequence in self._roster.running])
        draft = Draft(self._chunk_tokens, share=-(-decoding // self._stages))
        index = 0
        while index < len(self._roster.running):  # a preemption takes the last away
            self._rows.add(draft, self._roster.running[index], may_preempt=True)
            index += 1
        self._short = draft.short
        for sequence in self._admit() if not draft.short else ():
            self._rows.add(draft, sequence, may_preempt=False)
        if not draft.chosen:
            return None
        self._pool.submitted(self._step)
        self._step += 1
        return self._submitted(Decision(Batch(self._step - 1, ()), ()), (), draft)

    def join(self, decision: Decision) -> Decision | None:
        """The step decided last, which has not begun, with rows for what has come since and fits into it; None if there is nothing."""
        if self._stages > 1:
            return None
        _, members, draft = self._in_flight[-1]
        inside = {sequence for sequence, _ in draft.chosen}
        draft.share = len(self._roster.running)
        for sequence in [each for each in self._roster.running if each not in inside]:
            self._rows.add(draft, sequence, may_preempt=False)
        for sequence in self._admit() if not draft.short else ():
            if sequence not in inside:  # else preempted since
                self._rows.add(draft, sequence, may_preempt=False)
        self._short |= draft.short
        if len(draft.chosen) == len(members):
            return None
        self._in_flight.pop()
        return self._submitted(decision, members, draft)

    def _submitted(self, decision: Decision, members: Members, draft: Draft) -> Decision:
        """The decision, of `members`, with what the draft has more than these."""
        self._steady.forget()
        chosen = draft.chosen[len(members) :]
        rows, copies = tuple(row for _, row in chosen), self._pool.issue_copies()
        batch = Batch(decision.batch.step, decision.batch.rows + rows, decision.batch.copies + copies)
        self._in_flight.append((batch, members + tuple((sequence, sequence.table) for sequence, _ in chosen), draft))
        forked = self._branches.forked()
        return Decision(batch, decision.attempts + tuple(sequence.attempt_id for sequence, _ in chosen), decision.forked + forked)

    def _admit(self) -> list[Sequence]:
        """Give memory to those next in turn; returns the ones that start to compute here."""
        started = self._admission.admit(self._seats())
        for sequence in started:
            self._run(sequence)
        return started

    def _seats(self) -> int:
        """How many more may run; a granted transfer has its seat already, so that it decodes as soon as it commits."""
        return self._slots.count - len(self._roster.running) - self._leases.granted

    def _run(self, sequence: Sequence) -> None:
        if self._roster.run(sequence):
            self._totals.cached_tokens += sequence.cached

    def complete(self, output: StepOutput, now: float) -> DecodeOutcome:
        """The oldest step in flight has completed."""
        batch, members, _ = self._in_flight.popleft()
        assert output.step == batch.step, f"step {output.step} completed, {batch.step} was next"
        self._pool.completed(batch.step)
        self._slots.completed(batch.step)
        said = Said()
        for (sequence, table), row, drawn in zip(members, batch.rows, output.drawn, strict=True):
            if sequence.ended:
                continue
            if table is sequence.table:  # else preempted since
                sequence.done = row.start + row.length
                if row.start < sequence.target:  # what is generated is published when the table gives it back
                    table.publish(sequence.tokens, sequence.done)
            tokens = tokens_of(row.draws, drawn)
            if sequence.shared:
                if row.start + row.length == len(sequence.tokens):
                    sequence.pending -= 1
                    self._part(sequence, tokens, said, told=False)
            elif tokens:
                sequence.pending -= 1
                self._take(sequence, tokens[0], said)
        return said.outcome()

    def _take(self, sequence: Sequence, token: Token, said: Said) -> None:
        """The sequence's next token, which may end it."""
        finish = sequence.finish_of(token.id, len(sequence.tokens))
        if finish is not FinishReason.STOP:
            sequence.tokens.append(token.id)
            said.token(sequence.attempt_id, token)
        if finish is not None:
            said.choices.append(ChoiceFinished(sequence.attempt_id, sequence.choice, finish))
            self._end(sequence, said)

    def _end(self, sequence: Sequence, said: Said) -> None:
        """Nothing more is computed of it, and if it was the attempt's last, the attempt has ended."""
        if sequence in self._admission.preempted:
            self._admission.preempted.remove(sequence)
        sequence.ended = True
        self._growth.vacate(sequence)
        if self._roster.leave(sequence):
            cached, tally = min(sequence.cached, sequence.prompt_tokens), sequence.tally
            said.finished.append(Finished(sequence.attempt_id, cached, tally.local_prefill_tokens, tally.recomputed_tokens))

    def steady(self) -> int:
        """For how many rounds from now the decision stays the same rows, each one position on, and no choice ends before the last of them,
        if no message comes and no end token is drawn. A round is as many steps, all in flight at once, as it takes until each row was in
        one; with one stage it is a step. 0 with a step in flight, when the next has blocks to copy, or when somebody might start."""
        return 0 if self._may_change() else self._steady.rounds()

    def _may_change(self) -> bool:
        """Whether the next step may be another than the one before it, whatever runs."""
        return bool(self._in_flight or self._pool.copying or (self._admission.waiting and self._seats() and not self._admission.stuck))

    def advance(self, rounds: int, token_id: int) -> bool:
        """As `rounds` (at most `steady()`) times `decide` for all steps of a round, then `complete` for each, where every row draws
        `token_id`. Whether some have all their tokens by that: these end with `retire`, when the last round is over."""
        if not rounds:
            return False
        left = self._steady.left
        if self._may_change() or not 0 < rounds <= left:
            raise ValueError(f"{rounds} rounds; {self.steady()} are steady")
        rows = self.rows
        self._step += rounds * -(-rows // -(-rows // self._stages))
        self._steady.advance(rounds, token_id, self._step - 1)
        self._admission.look(self._seats())
        self._short = False
        return rounds == left

    def retire(self) -> DecodeOutcome:
        """Choices and attempts that end with the rounds that `advance` has made; the tokens of these are not listed."""
        said = Said()
        for sequence in self._steady.take_ended():
            said.choices.append(ChoiceFinished(sequence.attempt_id, sequence.choice, FinishReason.LENGTH))
            self._end(sequence, said)
        return said.outcome()

    @property
    def rows(self) -> int:
        """How many sequences run."""
        return len(self._roster.running)

    @property
    def context(self) -> int:
        """How many tokens those have together that run: what a step of all of them attends to."""
        return self._steady.context

    def load(self, now: float) -> Load:
        """What the worker's report says of this scheduler."""
        reading = self._roster.running if self._steady.reads else ()
        return self._totals.load(self._pool, self._admission, self._roster, reading, expected=len(self._expected))

    @property
    def counters(self) -> tuple[tuple[str, float], ...]:
        """Monotonic totals by metric name (`core.metrics`)."""
        return self._totals.counters(self._step)

    def measures(self) -> tuple[Measure, ...]:
        """What else the report says."""
        return measures(self._pool, sum(not sequence.local_prefill for sequence in self._admission.queue.values()))

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        self._steady.settle()
        self._pool.check()
        self._admission.check()
        self._slots.check({sequence.slot for sequence in self._roster.running if sequence.slot >= 0})
        assert len(self._roster.running) + self._leases.granted <= self._slots.count, "more may run than there are slots"
        self._roster.check(self._admission.preempted)
        pending = max((sequence.pending for choices in self._roster.started.values() for sequence in choices), default=0)
        assert self._stages == 1 or pending <= 1, "a sequence with a token in flight is in another step"

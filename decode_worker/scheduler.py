"""Which tokens a decode worker draws next, and to whom it lends memory. Pure: events in, decisions out; times are passed in.

    expect ─┬─ transfer: expected ──on_offer──▶ queued ──grants──▶ granted ──committed──▶ running ──▶ finished
            └─ local prefill: ───────────────▶ queued ──decide──────────────────────────▶ running ──▶ finished
                                                                  preempted ◀── memory ──────┘ └──▶ (recomputed)

Memory goes first to the growth of running requests (a watermark is kept for it), then to preempted ones, then to the queue
in order, where a smaller may pass a larger a bounded number of times. Below the watermark a transfer is granted only when its
source has said that it is nearly done.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ..core.commands import Decode, Finished, NewTokens
from ..core.errors import ContextExceeded, InvalidRequest
from ..core.prefix import chain
from ..core.request import FinishReason, Request, Token
from ..core.transfer import GroupGrant, RefusedReason
from ..engine.batch import Batch, Row, StepOutput
from ..engine.block_pool import BlockPool, BlockTable
from ..engine.slots import Slots
from ..worker.chunks import chunk_stop
from ..worker.draws import next_draw
from ..worker.load import Load
from .admission import Admission
from .sequence import Sequence, by_age
from .steady import advance_blocks, steady_steps


@dataclass(frozen=True, slots=True)
class Decision:
    """One step. `attempts[i]` names whose `batch.rows[i]` is."""

    batch: Batch
    attempts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DecodeOutcome:
    """Events for the router: new tokens in row order, then terminal events. End tokens are not among the tokens."""

    new_tokens: tuple[NewTokens, ...] = ()
    finished: tuple[Finished, ...] = ()


@dataclass(slots=True)
class Draft:
    """A step in the making. `budget`: prompt positions it may still compute. `short`: a request waits for blocks, so none younger
    takes any."""

    budget: int
    short: bool = False
    chosen: list[tuple[Sequence, Row]] = field(default_factory=list)


class DecodeScheduler:
    """Continuous batching; prompts are computed in chunks of `chunk_tokens` positions a step (over all rows) beside the decodes.

    `max_running`: slots of the engine; requests running or granted. `watermark`: share of each group's blocks kept free of
    new work for the growth of what runs. `step` counts from 0, as the engine does. Attempt id and transfer id are the same.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        root_hash_of: Callable[[Request], bytes],
        chunk_tokens: int,
        max_running: int,
        max_context: int,
        eos_token_ids: tuple[int, ...],
        watermark: float = 0.05,
    ) -> None:
        self._pool = pool
        self._root_hash_of = root_hash_of
        self._chunk_tokens = chunk_tokens
        self._longest = min(max_context, pool.longest(chunk_tokens))
        self._eos_token_ids = frozenset(eos_token_ids)
        self._slots = Slots(max_running)
        self._admission = Admission(pool, chunk_tokens=chunk_tokens, watermark=watermark)
        self._leases = self._admission.leases
        self._expected: dict[str, Sequence] = {}
        self._started: dict[str, Sequence] = {}
        self._running: list[Sequence] = []
        self._in_flight: deque[tuple[Batch, tuple[tuple[Sequence, BlockTable], ...]]] = deque()
        self._step = self._orders = 0
        self._cached_tokens = self._local_prefill_tokens = self._recomputed_tokens = 0

    def expect(self, decode: Decode, now: float) -> None:
        """An attempt: its transfer will be offered, or (`local_prefill`) it is queued at once. Raises `ContextExceeded` if it can
        never fit, `InvalidRequest` if its prompt is empty, it has nothing left to write, or its id is in use."""
        request, attempt_id = decode.request, decode.attempt_id
        tokens, prompt_tokens = list(request.token_ids), len(request.prompt_ids)
        if not prompt_tokens:
            raise InvalidRequest("The prompt has no token.", field="prompt")
        if len(request.generated) >= request.sampling.max_tokens:
            raise InvalidRequest("All of max_tokens is generated already.", field="max_tokens")
        if any(attempt_id in ids for ids in (self._expected, self._admission.queue, self._leases, self._started)):
            raise InvalidRequest(f"Attempt {attempt_id} is under way.", field="attempt_id")
        if len(tokens) >= self._longest:
            raise ContextExceeded(
                f"The prompt has {len(tokens)} tokens; with one of output this decode worker holds {self._longest}.", field="prompt"
            )
        root, sampling = self._root_hash_of(request), request.sampling
        sequence = Sequence(
            attempt_id,
            request,
            decode.local_prefill,
            tokens,
            prompt_tokens,
            limit=min(prompt_tokens + sampling.max_tokens, self._longest),
            stop_ids=sampling.ends(self._eos_token_ids),
            table=self._pool.open([root, *chain(root, tokens)]),
        )
        (self._admission.queue if decode.local_prefill else self._expected)[attempt_id] = sequence

    def on_offer(self, transfer_id: str, prompt_tokens: int, now: float) -> RefusedReason | None:
        """Queue an offered transfer for a grant. A reason: refuse it (CLOSED: no such attempt any more; FAILED: the offer is not
        about this attempt's prompt, and the loop fails the attempt with `transfer_failed`)."""
        sequence = self._expected.get(transfer_id)
        if sequence is None:
            return RefusedReason.CLOSED
        if prompt_tokens != len(sequence.tokens):
            return RefusedReason.FAILED
        self._admission.queue[transfer_id] = self._expected.pop(transfer_id)
        return None

    def nearly_done(self, transfer_id: str, now: float) -> None:
        """Its source will soon have it whole: it may be granted below the watermark. Unknown ids are ignored."""
        sequence = self._admission.queue.get(transfer_id)
        if sequence is not None:
            sequence.nearly_done = True

    def grants(self, now: float) -> list[tuple[str, tuple[GroupGrant, ...]]]:
        """Transfers to grant now, with their blocks; call after every message and every completed step."""
        self._admit()
        return self._admission.new_grants()

    def committed(self, transfer_id: str, first_tokens: tuple[Token, ...], now: float) -> DecodeOutcome:
        """The KV is here: decode from the next step. The outcome is empty unless the first token already ended the request. For an
        attempt cancelled meanwhile the blocks return (no `fenced` follows a commit)."""
        sequence = self._leases.commit(transfer_id)
        if sequence is None:
            return DecodeOutcome()
        sequence.decided = sequence.done = sequence.target = len(sequence.tokens)
        sequence.table.publish(sequence.tokens, sequence.done)
        self._run(sequence)
        finish = self._take(sequence, first_tokens[0].id)
        return DecodeOutcome(finished=(self._finish(sequence, finish),)) if finish else DecodeOutcome()

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
        sequence = self._started.get(attempt_id)
        if sequence is not None:
            self._end(sequence)
            return False
        queued = self._admission.queue.get(attempt_id)
        local = queued is not None and queued.local_prefill
        return (self.transfer_failed(attempt_id, now) and not local) or attempt_id in self._leases

    def decide(self, now: float) -> Decision | None:
        """The next step, or None if nothing can be computed before something else happens. May be called with steps in flight: a
        row whose last token is not yet known has empty `token_ids`."""
        draft = Draft(self._chunk_tokens)
        index = 0
        while index < len(self._running):  # a preemption takes the last away
            self._add_row(draft, self._running[index], may_preempt=True)
            index += 1
        for sequence in self._admit() if not draft.short else ():
            self._add_row(draft, sequence, may_preempt=False)
        if not draft.chosen:
            return None
        batch = Batch(self._step, tuple(row for _, row in draft.chosen))
        self._in_flight.append((batch, tuple((sequence, sequence.table) for sequence, _ in draft.chosen)))
        self._pool.submitted(self._step)
        self._step += 1
        return Decision(batch, tuple(sequence.attempt_id for sequence, _ in draft.chosen))

    def _add_row(self, draft: Draft, sequence: Sequence, *, may_preempt: bool) -> None:
        """The sequence's next row, if it has one and there are a slot, budget and blocks for it."""
        start, length = sequence.decided, sequence.length
        if length >= sequence.limit:
            return
        chunked = not sequence.decoding
        stop = chunk_stop(start, length, draft.budget, self._pool.block_size) if chunked else length
        if stop == start or not self._has_slot(sequence) or not self._grow(draft, sequence, stop, may_preempt):
            return
        if chunked:
            draft.budget -= stop - start
            self._count_computed(sequence, stop - start)
        token_ids = () if sequence.pending else tuple(sequence.tokens[start:stop])
        draw = None
        if stop == length:
            index = length - sequence.prompt_tokens
            draw = next_draw(sequence.request.sampling, index, sequence.tokens, sequence.stop_ids, pending=sequence.pending > 0)
            sequence.pending += 1
        sequence.decided = stop
        draft.chosen.append((sequence, Row(sequence.slot, start, token_ids, sequence.table.tables, draw)))

    def _has_slot(self, sequence: Sequence) -> bool:
        if sequence.slot < 0:
            slot = self._slots.take()
            sequence.slot = -1 if slot is None else slot
        return sequence.slot >= 0

    def _grow(self, draft: Draft, sequence: Sequence, stop: int, may_preempt: bool) -> bool:
        """Blocks for positions up to `stop`, if need be from the youngest. False: it waits for blocks that will come, by a step in
        flight, a transfer under way or an older request that ends."""
        table, start = sequence.table, sequence.decided
        if table.ready(start, stop):
            return True
        table.slide(start)
        lacks = table.lacks(stop, start)
        if not any(lacks):
            return True
        while not draft.short:
            if table.extend(stop, start):
                return True
            youngest = self._running[-1]
            coming = all(lack <= part.available + part.fenced for lack, part in zip(lacks, self._pool.parts, strict=True))
            if coming or youngest is sequence or not may_preempt:
                draft.short = True
            else:
                self._preempt(youngest)
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Take its blocks and slot. A token it has in flight still counts; everything else is computed again when memory allows."""
        self._running.remove(sequence)
        self._vacate(sequence)
        sequence.table = self._pool.open(sequence.table.hashes)
        sequence.decided = sequence.done = 0
        sequence.preempted = True
        self._admission.preempt(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        sequence.table.close()
        if sequence.slot >= 0:
            self._slots.give_back(sequence.slot, self._pool.fence)
            sequence.slot = -1

    def _count_computed(self, sequence: Sequence, positions: int) -> None:
        if sequence.preempted:
            sequence.recomputed_tokens += positions
            self._recomputed_tokens += positions
        else:
            sequence.local_prefill_tokens += positions
            self._local_prefill_tokens += positions

    def _admit(self) -> list[Sequence]:
        """Give memory to those next in turn; returns the ones that start to compute here."""
        started = self._admission.admit(self._seats())
        for sequence in started:
            self._run(sequence)
        return started

    def _seats(self) -> int:
        """How many more may run; a granted transfer has its seat already, so that it decodes as soon as it commits."""
        return self._slots.count - len(self._running) - self._leases.granted

    def _run(self, sequence: Sequence) -> None:
        if sequence.order < 0:
            sequence.order = self._orders
            self._orders += 1
            self._cached_tokens += sequence.cached
        insort(self._running, sequence, key=by_age)
        self._started[sequence.attempt_id] = sequence

    def complete(self, output: StepOutput, now: float) -> DecodeOutcome:
        """The oldest step in flight has completed."""
        batch, members = self._in_flight.popleft()
        assert output.step == batch.step, f"step {output.step} completed, {batch.step} was next"
        self._pool.completed(batch.step)
        self._slots.completed(batch.step)
        new_tokens: list[NewTokens] = []
        finished: list[Finished] = []
        for (sequence, table), row, drawn in zip(members, batch.rows, output.drawn, strict=True):
            if sequence.ended:
                continue
            if table is sequence.table:  # else preempted since
                sequence.done = row.start + row.length
                table.publish(sequence.tokens, sequence.done)
            if row.draw is None:
                continue
            assert drawn is not None, "the row asked for a token"
            sequence.pending -= 1
            finish = self._take(sequence, drawn.token_id)
            if finish is not FinishReason.STOP:
                token = Token(row.draw.index, drawn.token_id, drawn.logprob, drawn.top)
                new_tokens.append(NewTokens(sequence.attempt_id, (token,)))
            if finish is not None:
                finished.append(self._finish(sequence, finish))
        return DecodeOutcome(tuple(new_tokens), tuple(finished))

    def _take(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        """The sequence's next token; the reason if it ends the output."""
        if token_id in sequence.stop_ids:
            return FinishReason.STOP
        sequence.tokens.append(token_id)
        return FinishReason.LENGTH if len(sequence.tokens) >= sequence.limit else None

    def _finish(self, sequence: Sequence, finish: FinishReason) -> Finished:
        self._end(sequence)
        return Finished(
            sequence.attempt_id,
            finish,
            cached_tokens=min(sequence.cached, sequence.prompt_tokens),
            local_prefill_tokens=sequence.local_prefill_tokens,
            recomputed_tokens=sequence.recomputed_tokens,
        )

    def _end(self, sequence: Sequence) -> None:
        del self._started[sequence.attempt_id]
        (self._running if sequence in self._running else self._admission.preempted).remove(sequence)
        sequence.ended = True
        self._vacate(sequence)

    def steady(self) -> int:
        """For how many steps from now the decision stays the same rows, each one position on, and no request ends, if no message
        comes and no end token is drawn. 0 with a step in flight."""
        if self._in_flight or (self._admission.waiting and self._seats()):
            return 0
        return steady_steps(self._pool, self._running)

    def advance(self, steps: int, token_id: int, now: float) -> tuple[str, ...]:
        """As `steps` (at most `steady()`) times `decide` and `complete`, where every row draws `token_id`: each attempt returned,
        in row order, has `steps` tokens more."""
        if not 0 <= steps <= self.steady():
            raise ValueError(f"{steps} steps; {self.steady()} are steady")
        for sequence in self._running:
            sequence.tokens += [token_id] * steps
        advance_blocks(self._pool, self._running, self._step, steps)
        self._step += steps
        return tuple(sequence.attempt_id for sequence in self._running)

    def load(self, now: float) -> Load:
        """What the worker's report says of this scheduler."""
        free, total = self._pool.scarcest()
        waiting = [*self._admission.queue.values(), *self._admission.preempted]
        to_compute = sum(len(s.tokens) for s in waiting if s.local_prefill or s.preempted)
        to_compute += sum(max(0, s.target - s.done) for s in self._running)
        return Load(
            waiting=len(self._expected) + len(self._admission.queue) + self._leases.granted,
            running=len(self._started),
            prompt_tokens_waiting=to_compute,
            blocks_free=free,
            blocks_total=total,
            leases=len(self._leases),
            counters=(
                ("diptych_worker_steps_total", self._step),
                ("diptych_worker_cached_tokens_total", self._cached_tokens),
                ("diptych_worker_local_prefill_tokens_total", self._local_prefill_tokens),
                ("diptych_worker_recomputed_tokens_total", self._recomputed_tokens),
            ),
        )

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        self._pool.check()
        self._admission.check()
        self._slots.check({sequence.slot for sequence in self._running if sequence.slot >= 0})
        assert len(self._running) + self._leases.granted <= self._slots.count, "more may run than there are slots"
        started = [*self._running, *self._admission.preempted]
        assert {sequence.attempt_id: sequence for sequence in started} == self._started, "a started attempt is lost"
        assert len(started) == len(self._started), "an attempt is running and preempted"
        orders = [sequence.order for sequence in self._running]
        assert orders == sorted(orders), "running requests are not in order of age"
        for sequence in started:
            assert sequence.done <= sequence.decided < sequence.length <= sequence.limit, f"{sequence.attempt_id} lost its place"
            assert not sequence.ended, f"{sequence.attempt_id} has ended"

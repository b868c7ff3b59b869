"""Which prompts a prefill worker computes next. Pure: commands and outputs in, decisions out; times are passed in.

    add ──▶ waiting ──decide──▶ running ──last chunk complete──▶ leased ──release──▶ gone
               │                   │                                │
               └── cancel: gone    └── cancel: leased if offered    └── cancel: nothing more to do

A prompt is offered to its destination when its first chunk is decided (`Decision.started`). From then on its blocks stay
held until `release`, which the loop calls when the source says that the transfer has ended and nothing reads them any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum, auto
from operator import le

from ..core.commands import Finished, FirstTokens, Prefill
from ..core.errors import ContextExceeded, InvalidRequest
from ..core.fleet import Measure
from ..core.layout import CacheKind
from ..core.request import FinishReason, Request, Token
from ..core.value import value
from ..engine.batch import Batch, Draw, Drawn, Row, StepOutput
from ..engine.block_pool import BlockPool
from ..engine.slots import Slots
from ..worker.chunks import chunk_stop
from ..worker.draws import first_finish, next_draw
from ..worker.load import Load, measures
from .leases import Lease, Leases
from .prompt import Prompt

MAX_PASSES = 16
"""How many later prompts may start before one that does not fit yet."""
MAX_MISSES = 4
"""How many prompts that do not fit are looked at in one step: each costs a walk through the prefix table."""


@value
class Started:
    """An attempt whose first chunk is in this decision. With a `destination` the loop offers it there now, and may tell the
    source at once that positions [0, cached_tokens), which need no computing, lie in `tables` (all layers)."""

    attempt_id: str
    destination: str | None
    prompt_tokens: int
    cached_tokens: int
    tables: tuple[tuple[int, ...], ...]


@value
class Decision:
    """One step. `attempts[i]` names whose `batch.rows[i]` is; the row computes positions [row.start, row.start + row.length)
    of that attempt into `row.tables`."""

    batch: Batch
    attempts: tuple[str, ...]
    started: tuple[Started, ...] = ()


@value
class PrefillOutcome:
    """What a completed step means.

    `first_tokens`: prompts that are now whole, each with the first tokens of its choices.
    `finished`: terminal events, for prompts without a destination and for those of which no choice is left; of the latter the loop
    cancels the transfer, and `release` follows as for any other. The transfers of all others it commits with those tokens.
    """

    first_tokens: tuple[FirstTokens, ...] = ()
    finished: tuple[Finished, ...] = ()


class Obstacle(Enum):
    """Why a waiting prompt does not start: this step has no room (nothing behind it starts either), its destination's share is
    used up, or memory."""

    STEP = auto()
    SHARE = auto()
    MEMORY = auto()


class PrefillScheduler:
    """First come, first served; at most `chunk_tokens` positions a step over all rows; cached prefixes are skipped.

    What cannot start now (memory, or its destination's share) is passed by later prompts a bounded number of times. KV that
    one destination has not yet granted fills at most half of the pool where there are several (one prompt alone may be larger).
    `max_running`: slots of the engine; rows of a batch. `step` counts from 0, as the engine does. `hashes_of`: a request's root and the
    hashes of these tokens' whole blocks (`core.prefix.chained`).
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        hashes_of: Callable[[Request, Sequence[int]], list[bytes]],
        chunk_tokens: int,
        max_running: int,
        max_context: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._pool = pool
        self._hashes_of = hashes_of
        self._chunk_tokens = chunk_tokens
        self._max_context = max_context
        self._eos_token_ids = frozenset(eos_token_ids)
        self._slots = Slots(max_running)
        self._leases = Leases(pool.num_blocks)
        self._waiting: dict[str, Prompt] = {}
        self._running: dict[str, Prompt] = {}
        self._leased: dict[str, Prompt] = {}
        self._in_flight: deque[tuple[Batch, tuple[Prompt, ...]]] = deque()
        self._step = 0
        self._computed_tokens = self._cached_tokens = 0

    def add(self, prefill: Prefill, now: float) -> None:
        """Queue a prompt. Raises `ContextExceeded` if it can never fit, `InvalidRequest` if it is empty, has nothing left to write (or,
        without a destination, more than can be written here), or its id is in use."""
        request, attempt_id = prefill.request, prefill.attempt_id
        token_ids = request.token_ids
        if not token_ids:
            raise InvalidRequest("The prompt has no token.", field="prompt")
        if request.left < 1:
            raise InvalidRequest("All of max_tokens is generated already.", field="max_tokens")
        if prefill.destination is None and request.opening != request.live:
            raise InvalidRequest("Some choices go on behind tokens of their own: that takes a decode worker.", field="destination")
        if attempt_id in self._waiting or attempt_id in self._running or attempt_id in self._leased:
            raise InvalidRequest(f"Attempt {attempt_id} is under way.", field="attempt_id")
        self._leases.expect(prefill.destination)
        if len(token_ids) >= self._max_context:
            raise ContextExceeded(
                f"The prompt has {len(token_ids)} tokens; with one of output the context holds {self._max_context}.", field="prompt"
            )
        pool = self._pool
        blocks = tuple([pool.most_held(g, len(token_ids), self._chunk_tokens) for g in range(len(pool.groups))])
        if not all(map(le, blocks, pool.num_blocks)):
            raise ContextExceeded(f"The prompt has {len(token_ids)} tokens, more than this prefill worker's pool holds.", field="prompt")
        charge = tuple([0 if group.kind is CacheKind.FULL else held for group, held in zip(pool.groups, blocks, strict=True)])
        table = pool.open(self._hashes_of(request, token_ids))
        self._waiting[attempt_id] = Prompt(attempt_id, request, prefill.destination, token_ids, table, blocks, charge, now)

    def granted(self, attempt_id: str) -> None:
        """The destination has granted: the attempt no longer counts against its share. Unknown ids are ignored."""
        self._leases.granted(attempt_id)

    def movable(self) -> list[str]:
        """Attempts that lose nothing here but what was computed of their prompts: those that wait, and those computed whole that no
        destination has granted."""
        return [*self._waiting, *filter(self._leases.waits, self._leased)]

    def cancel(self, attempt_id: str, now: float) -> bool:
        """Compute nothing more of it. True if it was offered and its blocks stay held until `release` (the loop cancels the
        transfer); False if nothing of it is left here (unknown ids included)."""
        waiting = self._waiting.pop(attempt_id, None)
        if waiting is not None:
            waiting.table.close()
        running = self._running.get(attempt_id)
        if running is not None:
            self._leave(running)
        return attempt_id in self._leased

    def release(self, attempt_id: str, now: float) -> None:
        """The transfer has ended and nothing reads the blocks any more: give them back. In any state; unknown ids are ignored."""
        if self.cancel(attempt_id, now):
            self._close(self._leased.pop(attempt_id))

    def decide(self, now: float) -> Decision | None:
        """The next step, or None if nothing can be computed before something else happens. May be called with steps in flight."""
        if not self._running and not self._waiting:
            return None
        chosen: list[tuple[Prompt, Row]] = []
        budget = self._chunk_tokens
        for prompt in self._running.values():
            row = self._next_row(prompt, budget)
            if row is not None:
                chosen.append((prompt, row))
                budget -= row.length
        started = self._start(budget, now)
        chosen += started
        if not chosen:
            return None
        rows = tuple(row for _, row in chosen)
        decision = Decision(Batch(self._step, rows), tuple(p.attempt_id for p, _ in chosen), tuple(_started(p, r) for p, r in started))
        self._in_flight.append((decision.batch, tuple(prompt for prompt, _ in chosen)))
        self._pool.submitted(self._step)
        self._step += 1
        return decision

    def _next_row(self, prompt: Prompt, budget: int) -> Row | None:
        """The prompt's next chunk within `budget` positions; None if it has none left, or the blocks for it are still fenced."""
        start = prompt.decided
        stop = chunk_stop(start, prompt.tokens, budget, self._pool.block_size)
        if stop == start:
            return None
        prompt.table.slide(start)
        if not prompt.table.extend(stop, start):
            return None
        prompt.decided = stop
        draws = self._draws(prompt) if stop == prompt.tokens else ()
        return Row(prompt.slot, start, prompt.token_ids[start:stop], prompt.table.tables, draws)

    def _draws(self, prompt: Prompt) -> tuple[Draw, ...]:
        """The first token of every choice that begins behind the prompt."""
        sampling, index = prompt.request.sampling, prompt.first_index
        ends = sampling.ends(self._eos_token_ids)
        return tuple(next_draw(sampling, index, prompt.token_ids, ends, choice=choice) for choice in prompt.request.opening)

    def _start(self, budget: int, now: float) -> list[tuple[Prompt, Row]]:
        """Start waiting prompts with what is left of the budget, first come, first served among those that fit."""
        if not self._waiting:
            return []
        started: list[tuple[Prompt, Row]] = []
        missed: list[Prompt] = []
        over_share: dict[str | None, list[Prompt]] = {}
        for prompt in list(self._waiting.values()):
            if missed and (len(missed) == MAX_MISSES or any(earlier.passes >= MAX_PASSES for earlier in missed)):
                break
            siblings = over_share.get(prompt.destination, [])
            if siblings and siblings[0].passes >= MAX_PASSES:
                continue
            obstacle = self._obstacle(prompt, budget)
            if obstacle is Obstacle.STEP:
                break
            if obstacle is Obstacle.MEMORY:
                missed.append(prompt)
            elif obstacle is Obstacle.SHARE:
                over_share.setdefault(prompt.destination, []).append(prompt)
            else:
                row = self._begin(prompt, budget, now)
                started.append((prompt, row))
                budget -= row.length
                for earlier in (*missed, *siblings):
                    earlier.passes += 1
        return started

    def _obstacle(self, prompt: Prompt, budget: int) -> Obstacle | None:
        if not self._slots.available or budget < min(self._pool.block_size, prompt.tokens):
            return Obstacle.STEP
        if not self._leases.within_share(prompt.destination, prompt.blocks):
            return Obstacle.SHARE
        if not self._leases.fits(prompt.charge):
            return Obstacle.MEMORY
        pool, hashes = self._pool, prompt.table.hashes
        cached = pool.match(hashes, prompt.tokens - 1)
        stop = chunk_stop(cached, prompt.tokens, budget, pool.block_size)
        if stop == cached:
            return Obstacle.STEP
        costs = pool.cost(hashes, cached, prompt.tokens, cached)
        if pool.windows:
            first = pool.cost(hashes, cached, stop, cached)
            costs = tuple(costs[g] if group.kind is CacheKind.FULL else first[g] for g, group in enumerate(pool.groups))
        return None if all(map(le, costs, pool.available())) else Obstacle.MEMORY

    def _begin(self, prompt: Prompt, budget: int, now: float) -> Row:
        """Take all blocks of full groups, promise the window groups', and make the first chunk. Follows `_obstacle`."""
        slot = self._slots.take()
        assert slot is not None
        del self._waiting[prompt.attempt_id]
        self._running[prompt.attempt_id] = prompt
        prompt.slot, prompt.started = slot, now
        prompt.cached = prompt.decided = prompt.done = self._pool.match(prompt.table.hashes, prompt.tokens - 1)
        self._cached_tokens += prompt.cached
        prompt.table.adopt(prompt.cached, prompt.cached)
        whole = prompt.table.extend(prompt.tokens, prompt.cached, full_only=True)
        self._leases.begin(prompt.attempt_id, Lease(prompt.blocks, prompt.charge, prompt.destination))
        row = self._next_row(prompt, budget)
        assert whole, "an obstacle was overlooked"
        assert row is not None, "an obstacle was overlooked"
        return row

    def complete(self, output: StepOutput, now: float) -> PrefillOutcome:
        """The oldest step in flight has completed."""
        batch, prompts = self._in_flight.popleft()
        assert output.step == batch.step, f"step {output.step} completed, {batch.step} was next"
        self._pool.completed(batch.step)
        self._slots.completed(batch.step)
        first_tokens: list[FirstTokens] = []
        finished: list[Finished] = []
        for prompt, row, drawn in zip(prompts, batch.rows, output.drawn, strict=True):
            self._computed_tokens += row.length
            if not prompt.computing:
                continue
            prompt.done = row.start + row.length
            prompt.table.publish(prompt.token_ids, prompt.done)
            if prompt.done == prompt.tokens:
                first = self._first_tokens(prompt, drawn, now)
                first_tokens.append(first)
                if None not in first.finishes and prompt.request.opening == prompt.request.live:
                    finished.append(Finished(prompt.attempt_id, cached_tokens=prompt.cached))
                self._leave(prompt)
        return PrefillOutcome(tuple(first_tokens), tuple(finished))

    def _first_tokens(self, prompt: Prompt, drawn: tuple[Drawn, ...], now: float) -> FirstTokens:
        choices = zip(prompt.request.opening, drawn, strict=True)
        return FirstTokens(
            prompt.attempt_id,
            tuple(Token(prompt.first_index, each.token_id, each.logprob, each.top, choice) for choice, each in choices),
            tuple(self._finish(prompt, each.token_id) for each in drawn),
            queued=prompt.started - prompt.arrived,
            computed=now - prompt.started,
            cached_tokens=prompt.cached,
        )

    def _finish(self, prompt: Prompt, token_id: int) -> FinishReason | None:
        sampling = prompt.request.sampling
        finish = first_finish(sampling, token_id, prompt.first_index, prompt.tokens, sampling.ends(self._eos_token_ids), self._max_context)
        return FinishReason.LENGTH if finish is None and prompt.destination is None else finish

    def _leave(self, prompt: Prompt) -> None:
        """It computes nothing more: its slot returns, and its blocks unless a transfer may still read them."""
        del self._running[prompt.attempt_id]
        self._slots.give_back(prompt.slot, self._pool.fence)
        prompt.slot = -1
        if prompt.destination is None:
            self._close(prompt)
            return
        self._leased[prompt.attempt_id] = prompt
        prompt.table.slide(prompt.decided)
        self._leases.shrink(prompt.attempt_id, prompt.table.held())

    def _close(self, prompt: Prompt) -> None:
        prompt.table.close()
        self._leases.end(prompt.attempt_id)

    def load(self, now: float) -> Load:
        """What the worker's report says of this scheduler."""
        free, total = self._pool.scarcest()
        to_compute, leases = 0, len(self._leased)
        for prompt in self._waiting.values():
            to_compute += prompt.tokens
        for prompt in self._running.values():
            to_compute += prompt.tokens - prompt.done
            leases += prompt.destination is not None
        return Load(
            waiting=len(self._waiting),
            running=len(self._running),
            prompt_tokens_waiting=to_compute,
            blocks_free=free,
            blocks_total=total,
            leases=leases,
        )

    @property
    def counters(self) -> tuple[tuple[str, float], ...]:
        """Monotonic totals by metric name (`core.metrics`)."""
        return (
            ("diptych_worker_steps_total", self._step),
            ("diptych_worker_computed_tokens_total", self._computed_tokens),
            ("diptych_worker_cached_tokens_total", self._cached_tokens),
        )

    def measures(self) -> tuple[Measure, ...]:
        """What else the report says."""
        return measures(self._pool, self._leases.ungranted)

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        self._pool.check()
        started = self._running | self._leased
        self._slots.check({prompt.slot for prompt in self._running.values()})
        self._leases.check({attempt_id: prompt.table.held() for attempt_id, prompt in started.items()})
        assert len(started) + len(self._waiting) == len(started | self._waiting), "an attempt is in two states"
        for prompt in started.values():
            assert prompt.cached <= prompt.done <= prompt.decided <= prompt.tokens, f"{prompt.attempt_id} lost its place"
        assert not any(any(prompt.table.held()) for prompt in self._waiting.values()), "a waiting prompt holds blocks"


def _started(prompt: Prompt, row: Row) -> Started:
    return Started(prompt.attempt_id, prompt.destination, prompt.tokens, prompt.cached, row.tables)

"""An engine without arithmetic: KV is a digest of the tokens before it, and every token drawn depends on all KV its query sees.

Whatever a scheduler or a block pool does wrong (a block reused too early, a table off by one, a prefix that is not the same)
gives another token than `answer`, the sequential reference, or trips an assertion here.
"""

from __future__ import annotations

from collections.abc import Sequence

from diptych.core.layout import CacheGroup, CacheKind, DType
from diptych.core.prefix import chained, root_hash
from diptych.core.request import FinishReason, Request, Tokens
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import NO_BLOCK, Batch, Drawn, Row, StepOutput

BLOCK = 16
VOCAB = 40
EOS = (0,)

Cell = tuple[int, int]
"""Position and digest."""
Place = tuple[int, int, int]
"""Group, block, offset."""


def groups(*windows: int) -> tuple[CacheGroup, ...]:
    """A cache group per window; 0 is full attention."""
    kinds = [CacheKind.WINDOW if window else CacheKind.FULL for window in windows]
    return tuple(CacheGroup(kind, (i,), 1, 8, DType.FLOAT32, window) for i, (kind, window) in enumerate(zip(kinds, windows, strict=True)))


def request(
    token_ids: Sequence[int], *, generated: Sequence[Sequence[int]] = (), finished: Sequence[int] = (), tenant: str = "", **sampling: object
) -> Request:
    """Token 0 ends the output; `generated` by choice; `sampling` as `SamplingParams` has it."""
    params = SamplingParams(seed=0, **sampling)  # type: ignore[arg-type]
    had = tuple(tuple(ids) for ids in generated)
    return Request("r", "m", (Tokens(tuple(token_ids)),), params, generated=had, finished=frozenset(finished), tenant=tenant)


def hashes_of(request: Request, token_ids: Sequence[int]) -> list[bytes]:
    return chained(root_hash(fingerprint="fake", dtype="float32", tenant=request.tenant), token_ids)


def digests(token_ids: Sequence[int]) -> list[int]:
    """What the KV of each position is."""
    result, last = [], 0
    for token in token_ids:
        last = hash((last, token))
        result.append(last)
    return result


def draw(cache_groups: Sequence[CacheGroup], seen: Sequence[Sequence[int]], sampling: SamplingParams, index: int, choice: int) -> int:
    """The token drawn from `seen`: per group the digests of the positions that the query sees, itself included."""
    token = hash((tuple(hash(tuple(part)) for part in seen), sampling.seed, index, choice)) % VOCAB
    while token in banned(sampling, index):
        token = (token + 1) % VOCAB
    return token


def banned(sampling: SamplingParams, index: int) -> frozenset[int]:
    return sampling.ends(frozenset(EOS)) if index < sampling.min_tokens else frozenset()


def answer(asked: Request, cache_groups: Sequence[CacheGroup], longest: int, choice: int = 0) -> tuple[list[int], FinishReason]:
    """Output tokens of a choice (those already generated included) and why they end: one token after the other, no cache."""
    output, sampling = list(asked.generated_by(choice)), asked.sampling
    tokens = [*asked.prompt_ids, *output]
    while True:
        values, last = digests(tokens), len(tokens) - 1
        token = draw(cache_groups, [values[group.first_needed(last) :] for group in cache_groups], sampling, len(output), choice)
        if token in sampling.stop_token_ids or (token in EOS and not sampling.ignore_eos):
            return output, FinishReason.STOP
        tokens.append(token)
        output.append(token)
        if len(output) >= sampling.max_tokens or len(tokens) >= longest:
            return output, FinishReason.LENGTH


class FakeEngine:
    """Runs batches in order; may run them long after they were decided, as a real one does."""

    def __init__(self, cache_groups: Sequence[CacheGroup], num_blocks: Sequence[int], max_slots: int) -> None:
        self.groups, self.num_blocks, self.max_slots = tuple(cache_groups), tuple(num_blocks), max_slots
        self.cells: dict[Place, Cell] = {}
        self._last_drawn: dict[int, int] = {}
        self._histories: dict[int, tuple[int, ...]] = {}
        self._next_step = 0

    def run(self, batch: Batch) -> StepOutput:
        assert batch.step == self._next_step, "steps run in order"
        self._next_step += 1
        slots = [row.slot for row in batch.rows]
        assert len(set(slots)) == len(slots), "slots are distinct"
        assert all(0 <= slot < self.max_slots for slot in slots)
        self._copy(batch)
        parents = [self._check_earlier(row) for row in batch.rows]  # before any write: rows of a step do not see each other
        for row, parent in zip(batch.rows, parents, strict=True):
            self._store(row, parent)
        return StepOutput(batch.step, tuple(self._draw(row) for row in batch.rows))

    def _copy(self, batch: Batch) -> None:
        targets = [(each.group, each.destination) for each in batch.copies]
        assert len(set(targets)) == len(targets), "destinations are distinct"
        assert not {(each.group, each.source) for each in batch.copies} & set(targets), "no destination is a source"
        for g, source, target in [(each.group, each.source, each.destination) for each in batch.copies]:
            for offset in range(BLOCK):
                self.cells[g, target, offset] = self.cells.get((g, source, offset), (-1, 0))

    def place(self, g: int, table: Sequence[int], position: int) -> Place:
        block = table[position // BLOCK]
        assert block != NO_BLOCK, f"group {g} has given the block of position {position} back"
        assert 0 <= block < self.num_blocks[g]
        return g, block, position % BLOCK

    def seen(self, tables: Sequence[Sequence[int]], position: int, stop: int) -> list[list[int]]:
        """Per group the digests that a query at `position` sees of the positions before `stop`; checks that they are there."""
        result = []
        for g, group in enumerate(self.groups):
            part = []
            for earlier in range(group.first_needed(position), stop):
                at, value = self.cells[self.place(g, tables[g], earlier)]
                assert at == earlier, f"group {g}: position {at} where {earlier} should be"
                part.append(value)
            result.append(part)
        return result

    def _check_earlier(self, row: Row) -> int:
        parts = self.seen(row.tables, row.start, row.start)
        lasts = {part[-1] for part in parts if part}
        assert len(lasts) <= 1, "the groups hold different sequences"
        return lasts.pop() if lasts else 0

    def _store(self, row: Row, parent: int) -> None:
        tokens = row.token_ids or (self._last_drawn[row.slot],)
        for position, token in enumerate(tokens, row.start):
            parent = hash((parent, token))
            for g in range(len(self.groups)):
                self.cells[self.place(g, row.tables[g], position)] = (position, parent)

    def _draw(self, row: Row) -> tuple[Drawn, ...]:
        if not row.draws:
            return ()
        last = row.start + row.length - 1
        seen = self.seen(row.tables, last, last + 1)
        assert len({each.choice for each in row.draws}) == len(row.draws), "a choice is drawn once"
        drawn = tuple(Drawn(draw(self.groups, seen, each.sampling, each.index, each.choice)) for each in row.draws)
        for each in row.draws:
            assert each.banned == banned(each.sampling, each.index)
            if each.sampling.penalised:
                history = each.history or (*self._histories[row.slot], self._last_drawn[row.slot])
                assert len(history) == last + 1
                assert digests(history)[-1] == seen[0][-1], "the history is not what was computed"
                if each is row.draws[0]:
                    self._histories[row.slot] = history
        self._last_drawn[row.slot] = drawn[0].token_id
        return drawn

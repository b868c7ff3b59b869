"""Choices that leave what they share. Pure."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

from ..core.request import Request
from ..engine.block_pool import BlockPool
from .admission import Admission
from .roster import Roster
from .sequence import Sequence


class Branches:
    """Opens a sequence of its own for each further choice of an attempt. `hashes_of`: as for the scheduler."""

    def __init__(
        self, pool: BlockPool, roster: Roster, admission: Admission, hashes_of: Callable[[Request, Seq[int]], list[bytes]]
    ) -> None:
        self._pool, self._roster, self._admission, self._hashes_of = pool, roster, admission, hashes_of
        self._forked: list[str] = []

    def open(self, trunk: Sequence, shared: int, choice: int, tokens: list[int], *, seated: bool) -> None:
        """One more choice behind the first `shared` tokens of `trunk`; it waits if they or a block are not there, or it is not `seated`."""
        table = trunk.table.fork(shared) if trunk.done == shared and seated else None
        sequence = replace(
            trunk,
            choice=choice,
            tokens=tokens,
            table=table or self._pool.open(self._hashes_of(trunk.request, tokens)),
            slot=-1,
            preempted=False,
        )
        self._roster.enter(sequence)
        if table is None:
            sequence.decided = sequence.done = 0
            sequence.preempted = True
            self._admission.preempt(sequence)
            return
        sequence.decided = sequence.done = shared
        if self._pool.copying:
            self._forked.append(trunk.attempt_id)
        sequence.resume(shared)
        self._roster.run(sequence)

    def forked(self) -> tuple[str, ...]:
        """Attempts for which the next step copies a block, each told once."""
        forked, self._forked = tuple(self._forked), []
        return forked

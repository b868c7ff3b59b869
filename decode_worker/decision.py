"""One step of a decode worker, decided and in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.value import value
from ..engine.batch import Batch, Row
from .sequence import Sequence


@value
class Decision:
    """One step. `attempts[i]` names whose `batch.rows[i]` is; `forked` whose blocks it copies."""

    batch: Batch
    attempts: tuple[str, ...]
    forked: tuple[str, ...] = ()


@dataclass(slots=True)
class Draft:
    """A step in the making. `budget`: prompt positions it may still compute; `share`: sequences that decode it may still take. `short`: a
    request waits for blocks, so none younger takes any."""

    budget: int
    share: int
    short: bool = False
    chosen: list[tuple[Sequence, Row]] = field(default_factory=list)

"""Which other numbers of workers to try under the recent load, and whether one of them is worth a change. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

MOVES = 2
"""Workers of one phase that one change makes more or fewer. The next look may go on."""
HEADROOM = 1.25
"""Fewer workers must still serve so many times the load: else the next fluctuation would call them back."""


@dataclass(frozen=True, slots=True, order=True)
class Split:
    """Workers of each phase."""

    prefills: int
    decodes: int

    @property
    def workers(self) -> int:
        return self.prefills + self.decodes

    def __str__(self) -> str:
        return f"{self.prefills} prefill + {self.decodes} decode"


@dataclass(frozen=True, slots=True)
class Score:
    """What a simulation of the recent load gave. `ttft`, `tpot`: p90 in seconds."""

    met: int
    total: int
    ttft: float | None = None
    tpot: float | None = None

    @property
    def share(self) -> float:
        return self.met / self.total

    def __str__(self) -> str:
        times = [f"{name} p90 {1000 * value:.0f} ms" for name, value in (("TTFT", self.ttft), ("TPOT", self.tpot)) if value is not None]
        return ", ".join([f"{self.share:.1%}", *times])


@dataclass(frozen=True, slots=True)
class Terms:
    """`margin`: how much larger the share must be that meets the SLO. `least`, `most`: workers of both phases together; None: as many as
    there are. `paired`: they come and go in pairs."""

    target: float = 0.9
    margin: float = 0.05
    least: int | None = None
    most: int | None = None
    paired: bool = False

    @property
    def step(self) -> int:
        """How many workers join or leave at once."""
        return 2 if self.paired else 1


def candidates(now: Split, terms: Terms) -> Iterator[Split]:
    """The split as it is, first; then others. Each phase keeps a worker."""
    yield now
    least = now.workers if terms.least is None else terms.least
    most = now.workers if terms.most is None else terms.most
    for prefills in range(max(1, now.prefills - MOVES), now.prefills + MOVES + 1):
        for decodes in range(max(1, now.decodes - MOVES), now.decodes + MOVES + 1):
            split = Split(prefills, decodes)
            if split == now or abs(split.workers - now.workers) > terms.step or (terms.paired and prefills != decodes):
                continue
            if least <= split.workers <= most or split.workers == now.workers:
                yield split


def chosen(now: Split, scores: Mapping[Split, Score], terms: Terms) -> Split:
    """The split to have; `now` unless another is surely better. Those of fewer workers were tried with `HEADROOM` times the load."""
    current = scores[now].share

    def best(workers: int) -> Split | None:
        alike = [split for split in scores if split.workers == workers and split != now]
        return max(alike, key=lambda split: (scores[split].share, -abs(split.prefills - now.prefills)), default=None)

    if current >= terms.target:
        fewer = best(now.workers - terms.step)
        return fewer if fewer is not None and scores[fewer].share >= terms.target else now
    other, more = best(now.workers), best(now.workers + terms.step)
    if other is None or scores[other].share < current + terms.margin:
        other = now
    if more is not None and scores[other].share < terms.target and scores[more].share >= scores[other].share + terms.margin:
        return more
    return other

"""When to plan again, and when to act on it: looks at windows of the workload and at scores, says what to do. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...core.workload import Window
from ..load.slo import Slo
from ..load.summary import wilson
from ..load.workload import Arrival
from .drift import settled, shifts
from .figures import Figures, arrivals_in, attained
from .replan import Score, Split, Terms, chosen

CONFIDENCE = 0.99


@dataclass(frozen=True, slots=True)
class Look:
    """A load to simulate `split`, the one there is, and the others under. `shifted`: it is not the one that was planned for."""

    why: str
    shifted: bool
    split: Split
    arrivals: list[Arrival]
    seconds: float
    figures: Figures


@dataclass(frozen=True, slots=True)
class Decision:
    """`split`: the one to have; as it is if nothing is worth a change. `sure`: it has won twice in a row, so act."""

    look: Look
    scores: Mapping[Split, Score]
    split: Split
    sure: bool

    @property
    def changes(self) -> bool:
        return self.split != self.look.split

    def __str__(self) -> str:
        now, other = self.look.split, self.split
        if not self.changes:
            return f"{self.look.why}: {now} stays ({self.scores[now]})"
        later = "" if self.sure else "; looked at once more before anything is done"
        return f"{self.look.why}: {other} ({self.scores[other]}) in place of {now} ({self.scores[now]}){later}"


@dataclass(slots=True)
class Autoplanner:
    """`look` at each window; if it returns a load, simulate it and have `judge` decide. Times are seconds on one clock.

    What keeps it from going to and fro: a load is planned for once, and again when it has been seen for twice as long, until that is a
    window; a change must win by a margin, twice in a row, on windows that do not change within themselves; and after one nothing is planned
    for `cool_down_s`.
    """

    slo: Slo
    terms: Terms
    least: int
    cool_down_s: float
    window_s: float = float("inf")
    """Of a longer window the last part is looked at; what came before tells how long answers are."""
    _planned: Figures | None = None
    _seen_s: float = 0.0
    """For how long what was planned for had been seen."""
    _quiet_until: float = field(default=float("-inf"))
    _patient_until: float = field(default=float("-inf"))
    """Until then that requests miss the SLO is no reason to look: nothing better was found for this load."""
    _wins: Split | None = None

    def look(self, now: float, window: Window, split: Split) -> Look | None:
        """None: there is nothing to plan for."""
        asked = min(window.seconds, self.window_s)
        if now < self._quiet_until or (found := settled(arrivals_in(window, asked), asked, self.least)) is None:
            return None
        arrivals, seconds = found
        figures = Figures.of(arrivals, seconds)
        if self._planned is None:
            return Look("the first look at the load", True, split, arrivals, seconds, figures)
        if changed := shifts(self._planned, figures):
            return Look(", ".join(map(str, changed)), True, split, arrivals, seconds, figures)
        if self._wins is not None:
            return Look(f"{self._wins} has won once", False, split, arrivals, seconds, figures)
        if self._seen_s < seconds >= min(2 * self._seen_s, self.window_s):
            return Look(f"the load has been seen for {seconds:.0f} s, not {self._seen_s:.0f}", False, split, arrivals, seconds, figures)
        if now >= self._patient_until and (missed := self._missed(window, seconds)):
            return Look(missed, False, split, arrivals, seconds, figures)
        return None

    def _missed(self, window: Window, seconds: float) -> str | None:
        met, known = attained([each for each in window.requests if each.age <= seconds], self.slo)
        if known < self.least or wilson(met, known, CONFIDENCE)[1] >= self.terms.target:
            return None
        return f"{met} of {known} requests met {self.slo}"

    def judge(self, now: float, look: Look, scores: Mapping[Split, Score]) -> Decision:
        """`scores`: of `look.split` and of others."""
        split = chosen(look.split, scores, self.terms)
        sure = split != look.split and split == self._wins
        if sure or split == look.split:
            self._planned, self._seen_s, self._wins = look.figures, look.seconds, None
            self._patient_until = now + self.cool_down_s
        else:
            self._wins = split
        if sure:
            self.changed(now)
        return Decision(look, scores, split, sure)

    def changed(self, now: float) -> None:
        """Workers have come, gone or changed their role: what is measured until they have caught up is of neither split."""
        self._quiet_until = now + self.cool_down_s
        self._wins = None

"""How a run stands while it goes on: whether it is known already that it will not meet its target. Pure."""

from __future__ import annotations

from ..load.goodput import Probe, Trial, Verdict


class Standing:
    """Requests are judged at the trial's looks, in the order of their sending, when all up to the look have ended; or sooner, when so many
    of them have missed the SLO that it does not matter what becomes of the others (but not if `whole`: then the share is that of all).
    That the target is met is not believed at a look before `believed`."""

    def __init__(self, trial: Trial, believed: int, *, whole: bool = False) -> None:
        self._trial, self._believed, self._whole = trial, min(trial.most, believed), whole
        self._looks = iter(trial.looks)
        self._look = next(self._looks)
        self._known: dict[int, bool] = {}
        self._met = self._missed = 0
        self.verdict = Verdict.OPEN
        self.done = False

    def add(self, number: int, met: bool) -> None:
        """What became of request `number`, counted from 0; said twice it counts once."""
        if self.done or number in self._known:
            return
        self._known[number] = met
        if number < self._look:
            self._count(met)
            while not self.done and (verdict := self._judged()) is not None:
                self._conclude(verdict)

    def _count(self, met: bool) -> None:
        self._met += met
        self._missed += not met

    def _judged(self) -> Verdict | None:
        """None while it depends on what is not known."""
        look, judge = self._look, self._trial.judge
        if not self._whole and judge(look - self._missed, look) is Verdict.MISSED:
            return Verdict.MISSED
        if self._met + self._missed < look:
            return None
        verdict = judge(self._met, look)
        return Verdict.OPEN if verdict is Verdict.MET and look < self._believed else verdict

    def _conclude(self, verdict: Verdict) -> None:
        """It ends at this look, or goes on to the next."""
        self.verdict = verdict
        look = next(self._looks, None)
        if verdict is not Verdict.OPEN or look is None:
            self.done = True
            return
        self._look, self._met, self._missed = look, 0, 0
        for number, met in self._known.items():
            if number < look:
                self._count(met)

    def probe(self, rate: float) -> Probe:
        """Where the target is missed, `met` is the most that may have."""
        total = self._look if self.verdict is Verdict.MISSED else self._met + self._missed
        met = total - self._missed
        low, high = self._trial.interval(met, total)
        return Probe(rate, met, total, low, high, self.verdict)

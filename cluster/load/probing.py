"""Probes of a goodput search, run against a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import islice

from .answer import Answer
from .goodput import Goodput, Probe, Search, Tally, Trial, Verdict
from .open_loop import Asker, open_loop
from .slo import Slo
from .summary import percentile
from .workload import Arrival

Load = Callable[[float, int], Iterator[Arrival]]
"""The endless load of a rate; the second number is its variant: every probe has prompts of its own."""


class Prober:
    """Runs probes one after another. `warm_up` requests of each are sent first and not counted."""

    def __init__(self, asker: Asker, load: Load, slo: Slo, trial: Trial, warm_up: int, on_answer: Callable[[Probe], None]) -> None:
        self._asker, self._load, self._slo, self._trial, self._warm_up = asker, load, slo, trial, warm_up
        self._on_answer = on_answer

    async def search(self, search: Search, stop: asyncio.Event, budget_s: float) -> Goodput:
        """Probe until the search has ended, `stop` is set or `budget_s` have passed."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(budget_s, stop.set)
        try:
            while not stop.is_set() and (rate := search.next_rate()) is not None:
                number = 1 + len(search.probes)
                await self._settle(number, stop)
                probe = await self._probe(rate, number, stop)
                if probe.total:
                    search.add(probe)
        finally:
            timer.cancel()
        return search.found()

    async def _settle(self, number: int, stop: asyncio.Event) -> None:
        """Wait out what the last probe left in the server's queues: one request, answered behind it."""
        await open_loop(self._asker, islice(self._load(1.0, -number), 1), stop, lambda answer: None, lambda: None)

    async def _probe(self, rate: float, number: int, stop: asyncio.Event) -> Probe:
        """Sends until the trial is decided; requests still under way then are cut off. Judged only by prefixes in sending order."""
        tally, lags = Tally(), list[float]()
        decided = asyncio.Event()
        looks = iter(self._trial.looks)
        ahead = next(looks)
        probe = self._judged(rate, tally, lags)

        def on_answer(answer: Answer) -> None:
            nonlocal ahead, probe
            if answer.arrival.number < self._warm_up or decided.is_set():
                return
            lags.append(answer.lag)
            tally.add(answer.arrival.number - self._warm_up, self._slo.met(answer))
            while tally.advance(ahead) and not decided.is_set():
                probe = self._judged(rate, tally, lags)
                following = next(looks, None)
                if probe.verdict is not Verdict.OPEN or following is None:
                    decided.set()
                else:
                    ahead = following
            self._on_answer(probe if decided.is_set() else self._judged(rate, tally, lags))

        forward = asyncio.create_task(_either(stop, decided))
        try:
            # Beyond the last look the load goes on, so that the last requests counted run under it too.
            await open_loop(self._asker, self._load(rate, number), decided, on_answer, lambda: None)
        finally:
            forward.cancel()
        return probe if probe.verdict is not Verdict.OPEN else self._judged(rate, tally, lags)

    def _judged(self, rate: float, tally: Tally, lags: list[float]) -> Probe:
        if not tally.total:
            return Probe(rate, 0, 0, 0.0, 1.0, Verdict.OPEN)
        low, high = self._trial.interval(tally.met, tally.total)
        verdict = self._trial.judge(tally.met, tally.total) if tally.total in self._trial.looks else Verdict.OPEN
        return Probe(rate, tally.met, tally.total, low, high, verdict, percentile(sorted(lags), 0.99))


async def _either(stop: asyncio.Event, decided: asyncio.Event) -> None:
    await stop.wait()
    decided.set()

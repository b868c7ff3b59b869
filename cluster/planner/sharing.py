"""Workers on the cores of one host: who computes where at a moment, and how long a step takes for that. Pure.

Each worker has cores of its own, and lends those that it does not use (`worker.lending`) to those whose patience they have been idle for
(`worker.patience`). While others compute, a step takes as many times as long as the profile says. Workers for
which there are too few cores roam: those that compute share all cores evenly, each with no more of them than it has threads.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from ...core.fleet import Phase
from ...worker.patience import LATE_NS, SOON_NS, Patience
from .agenda import Agenda, on_grid
from .latency import DecodeTimes, PrefillTimes, StepTimes, Work, step_seconds
from .profile import Hardware, Profile, slower

RESTS_S = sorted(rest_ns / 1e9 for rest_ns in {*SOON_NS.values(), LATE_NS})


class Host:
    """The places of all its workers."""

    def __init__(self, agenda: Agenda, profile: Profile) -> None:
        self.agenda = agenda
        self.places: list[Place] = []
        self._profile = profile
        self._known: dict[tuple[Phase, int, int, float], StepTimes] = {}

    def place(self, hardware: Hardware, changed: Callable[[], None]) -> Place:
        """For one more worker; `changed` is called when its steps may take longer, or less long, than before."""
        place = Place(self, hardware, changed)
        self.places.append(place)
        return place

    def times(self, hardware: Hardware, cores: int, beside: float, wanted: int = 0) -> StepTimes:
        """`beside`: how many sequences decode where others compute meanwhile; 0: nobody does. `wanted`: by all who roam; what there is of
        it is shared."""
        assert self._profile.cores is not None, "a worker on the cores of a host without"
        host = self._profile.cores
        factor = max(1.0, wanted / host.count)
        if beside:
            factor *= slower(host.prefill_beside if hardware.phase is Phase.PREFILL else host.decode_beside, beside)
        key = hardware.phase, hardware.tp, cores, factor
        if key not in self._known:
            known = self._profile.parallelism(hardware.tp)
            assert known is not None, f"no times for tp {hardware.tp}"
            times = known.on_cores(cores, hardware.phase)
            self._known[key] = times if factor == 1.0 else scaled(times, factor)
        return self._known[key]


class Place:
    """One worker's: its cores, or the threads with which it roams, and whether it computes."""

    def __init__(self, host: Host, hardware: Hardware, changed: Callable[[], None]) -> None:
        assert hardware.on_host, "a worker that shares no cores has no place"
        self._host, self._hardware, self._changed = host, hardware, changed
        self._cores, self._roaming, self._patience = hardware.cores or 0, hardware.roaming, Patience(hardware.phase)
        self._busy = False
        self._rows = math.inf
        """Sequences that decode in its step; a prompt is like many."""
        self._since = -RESTS_S[-1]  # idle for as long as anybody waits
        self._has: dict[Place, float] = {}
        """Whose cores it has borrowed, and since when they had been idle."""

    def times(self, rows: int) -> StepTimes:
        """Of its steps of so many rows as it is now. What is idle for long enough is shared evenly by those who compute."""
        others = [each for each in self._host.places if each is not self]
        computing = [each for each in others if each._busy]
        beside = float(sum(each._rows for each in computing))
        if self._hardware.phase is Phase.DECODE:
            self._rows = rows or math.inf
            beside = self._rows if computing else 0.0
        if self._roaming:
            theirs = sum(each._roaming for each in computing)
            return self._host.times(self._hardware, self._roaming, beside, self._roaming + theirs)
        lent = sum(each._cores for each in others if self._borrows(each, rows))
        return self._host.times(self._hardware, self._cores + lent // (1 + len(computing)), beside)

    def _borrows(self, other: Place, rows: int) -> bool:
        """What it has borrowed it keeps until its owner computes, or itself does not."""
        if other._busy:
            return False
        rest_s = self._patience.rest_ns(rows, round(other._since * 1e9)) / 1e9
        if self._host.agenda.now >= on_grid(other._since + rest_s):
            self._has[other] = other._since
        return self._has.get(other) == other._since

    def begin(self) -> None:
        """It computes from now on."""
        if not self._busy:
            self._busy = True
            for each in self._computing():
                each._patience.disturbed(round(self._host.agenda.now * 1e9))
            self._tell()

    def end(self) -> None:
        """It has nothing to compute any more."""
        if self._busy:
            self._busy, self._since = False, self._host.agenda.now
            self._has.clear()
            self._tell()
            for rest_s in RESTS_S:
                self._host.agenda.after(rest_s, self._tell)

    def _computing(self) -> list[Place]:
        return [each for each in self._host.places if each is not self and each._busy]

    def _tell(self) -> None:
        for each in self._computing():
            each._changed()


class Paced:
    """Steps of one place, one after another. When its times change, what is left of the step that runs takes its share of the new ones."""

    def __init__(self, agenda: Agenda, place: Place) -> None:
        self._agenda, self._place = agenda, place
        self._waiting: deque[tuple[Work, Callable[[float], None]]] = deque()
        self._running: Work | None = None
        self._left = self._seconds = self._began = self._since = 0.0
        self._number = 0

    def add(self, work: Work, ran: Callable[[float], None]) -> None:
        """Run it when all before it have run; `ran` is then told how long it took."""
        self._waiting.append((work, ran))
        if self._running is None:
            self._place.begin()
            self._next()

    def _next(self) -> None:
        self._running = self._waiting[0][0]
        self._began, self._left = self._agenda.now, 1.0
        self._go_on()

    def _go_on(self) -> None:
        assert self._running is not None
        self._since, self._seconds = self._agenda.now, step_seconds(self._place.times(self._running.rows), self._running)
        self._number += 1
        self._agenda.after(self._left * self._seconds, self._over, self._number)

    def changed(self) -> None:
        if self._running is not None:
            self._left = max(0.0, self._left - (self._agenda.now - self._since) / self._seconds)
            self._go_on()

    def _over(self, number: int) -> None:
        if number != self._number:
            return
        self._running, seconds = None, self._agenda.now - self._began
        _, ran = self._waiting.popleft()
        if self._waiting:
            self._next()
        ran(seconds)
        if self._running is None:
            self._place.end()


def scaled(times: StepTimes, factor: float) -> StepTimes:
    """Each term so many times as long."""

    def prefill(each: PrefillTimes) -> PrefillTimes:
        return PrefillTimes(constant=each.constant * factor, token=each.token * factor, pair=each.pair * factor)

    def decode(each: DecodeTimes) -> DecodeTimes:
        return DecodeTimes(constant=each.constant * factor, context=each.context * factor, row=each.row * factor)

    names = ("both", "both_row", "step", "step_context", "step_row", "hop")
    around = {name: value * factor for name in names if (value := getattr(times, name)) is not None}
    large = None if times.decode_large is None else decode(times.decode_large)
    return times.model_copy(update={"prefill": prefill(times.prefill), "decode": decode(times.decode), "decode_large": large, **around})

"""The sequences of a decode worker that have started: which attempt they belong to, which of them run, in what order they came."""

from __future__ import annotations

from bisect import insort

from .sequence import Sequence, by_age


class Roster:
    """`running`: oldest first; those started and not running are preempted. `started`: the live choices of each attempt. `changes`: counts
    how often others ran than before."""

    def __init__(self) -> None:
        self.running: list[Sequence] = []
        self.started: dict[str, list[Sequence]] = {}
        self.changes = self._orders = 0

    def run(self, sequence: Sequence) -> bool:
        """It runs from now on. True if it has not started before."""
        new = sequence.order < 0
        if new:
            self.enter(sequence)
        insort(self.running, sequence, key=by_age)
        self.changes += 1
        return new

    def pause(self, sequence: Sequence) -> None:
        """It runs no more for a while."""
        self.running.remove(sequence)
        self.changes += 1

    def enter(self, sequence: Sequence) -> None:
        """It is the youngest of all, and one of its attempt's choices."""
        sequence.order = self._orders
        self._orders += 1
        self.started.setdefault(sequence.attempt_id, []).append(sequence)

    def leave(self, sequence: Sequence) -> bool:
        """It has ended. True if it was its attempt's last."""
        if sequence in self.running:
            self.pause(sequence)
        choices = self.started[sequence.attempt_id]
        choices.remove(sequence)
        if not choices:
            del self.started[sequence.attempt_id]
        return not choices

    def check(self, preempted: list[Sequence]) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        started = [*self.running, *preempted]
        assert len(started) == len({(sequence.attempt_id, sequence.choice) for sequence in started}), "a choice is there twice"
        listed = [sequence for choices in self.started.values() for sequence in choices]
        assert set(started) == set(listed), "a started attempt is lost"
        assert len(started) == len(listed), "a choice is running and preempted"
        orders = [sequence.order for sequence in self.running]
        assert orders == sorted(orders), "running requests are not in order of age"
        for sequence in started:
            assert sequence.done <= sequence.decided < sequence.length <= sequence.limit, f"{sequence.attempt_id} lost its place"
            assert not sequence.ended, f"{sequence.attempt_id} has ended"
            assert sequence.table.reaches(sequence.done), f"{sequence.attempt_id} has lost what it has computed"
            assert sequence.table.alone_from(sequence.done), f"{sequence.attempt_id} writes where another reads"

"""How long a core must have been idle before a rank borrows it. Pure: times are passed in, in nanoseconds of any clock."""

from __future__ import annotations

from ..core.fleet import Phase

SOON_NS = {Phase.PREFILL: 2_000_000, Phase.DECODE: 20_000_000}
"""A prompt is read faster with any core that is free for a moment. An answer's tokens are to come evenly: a core that is free between two
prompts that follow one another is no gain."""
LATE_NS = 1_000_000_000
"""For answers while prompts come between their tokens: where a core is borrowed and taken back every second or so some tokens come late.
With 2 ms here too, at 0.75 prompts a second, ITL p50 was 20 ms in place of 24 and p99 54 in place of 35."""
CALM_NS = 10_000_000_000
"""So long after one that came between tokens prompts are expected to do so again."""
MANY_ROWS = 4
"""From so many sequences on a step computes more than it reads, and two cores make it shorter than a prompt that comes makes it longer."""


class Patience:
    """Of one rank."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self._disturbed_at: int | None = None

    def disturbed(self, now: int) -> None:
        """Somebody wanted a core that had been idle while this rank computed."""
        self._disturbed_at = now

    def rest_ns(self, rows: int, since: int) -> int:
        """How long a core must rest that has been idle since `since`, for a step of `rows` rows."""
        calm = self._disturbed_at is None or since - self._disturbed_at >= CALM_NS
        return SOON_NS[self._phase] if calm or rows >= MANY_ROWS or self._phase is Phase.PREFILL else LATE_NS

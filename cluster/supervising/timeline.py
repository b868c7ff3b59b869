"""When what happened while a cluster started: what `up -v` prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Moment:
    """`at`: seconds since the command was typed (its process started)."""

    at: float
    who: str
    what: str


@dataclass(slots=True)
class TimeLine:
    """`elapsed` gives seconds since the start."""

    elapsed: Callable[[], float]
    moments: list[Moment] = field(default_factory=list)

    def mark(self, who: str, what: str) -> None:
        self.moments.append(Moment(self.elapsed(), who, what))

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Per moment in order: when, who, what, and seconds since the same one's moment before."""
        last: dict[str, float] = {}
        rows = []
        for moment in sorted(self.moments, key=lambda moment: moment.at):
            step = moment.at - last[moment.who] if moment.who in last else None
            last[moment.who] = moment.at
            rows.append((f"{moment.at:6.2f} s", moment.who, moment.what, f"+{step:.2f} s" if step is not None else ""))
        return rows

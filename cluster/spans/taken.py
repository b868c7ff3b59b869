"""What one process did while it was recorded: its spans, each within the one around it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ...core.recordings import Doing, Recorded, Span


@dataclass(frozen=True, slots=True)
class Process:
    """`name` and `phase` as the fleet has them (phase "router" of a router). Its clock is `ahead` of ours by so many ns, give or take
    `unsure`; 0 on one host."""

    name: str
    phase: str
    pid: int
    ahead: int
    unsure: int
    recorded: Recorded


@dataclass(slots=True)
class Node:
    """A span and those directly within it. `alone`, `alone_on_core`: its ns without theirs."""

    span: Span
    within: list[Node] = field(default_factory=list)

    @property
    def lasted(self) -> int:
        return self.span.ended - self.span.began

    @property
    def alone(self) -> int:
        return self.lasted - sum(node.lasted for node in self.within)

    @property
    def alone_on_core(self) -> int:
        return max(0, self.span.on_core - sum(node.span.on_core for node in self.within))

    def all(self) -> Iterator[Node]:
        """Itself and whatever is in it."""
        yield self
        for node in self.within:
            yield from node.all()


def nested(spans: tuple[Span, ...]) -> dict[int, list[Node]]:
    """The outermost spans of each thread, in order. Raises `ValueError` if two of a thread overlap and neither lies in the other."""
    outermost: dict[int, list[Node]] = {}
    around: dict[int, list[Node]] = {}
    for span in sorted(spans, key=lambda span: (span.began, -span.ended)):
        open_ones = around.setdefault(span.thread, [])
        while open_ones and open_ones[-1].span.ended <= span.began:
            open_ones.pop()
        if open_ones and open_ones[-1].span.ended < span.ended:
            raise ValueError(f"spans of one thread overlap: {open_ones[-1].span} and {span}")
        node = Node(span)
        (open_ones[-1].within if open_ones else outermost.setdefault(span.thread, [])).append(node)
        open_ones.append(node)
    return outermost


WAITS = (Doing.IDLE, Doing.WAIT, Doing.UNDER_WAY)

"""What we want of ourselves beside the best peer on the same machine in the same run, measure by measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diptych.benchmarks.peers.loads import ALONE, LONG, SEARCH, STEADY, TOGETHER

PEER = "vLLM"
"""What the goals are shares of."""

Result = Mapping[str, Any]
"""Of one server: `start_s`, and by name of a load what `diptych bench` reports."""


@dataclass(frozen=True, slots=True)
class Goal:
    """`limit`: the greatest, or with `more` the least, that we want; times the peer's value if `of_peer`. `bound`: its name among
    what the machine allows at most, in seconds where this is in milliseconds."""

    name: str
    unit: str
    value: Callable[[Result], float | None]
    limit: float
    of_peer: bool = True
    more: bool = False
    bound: str | None = None

    def reached(self, ours: Result, peer: Result) -> bool | None:
        """None if it was not measured."""
        found, theirs = self.value(ours), self.value(peer) if self.of_peer else 1.0
        if found is None or theirs is None:
            return None
        wanted = self.limit * theirs
        return found >= wanted if self.more else found <= wanted

    @property
    def wanted(self) -> str:
        return f"{'≥' if self.more else '≤'} {self.limit:g}" + (f" × {PEER}" if self.of_peer else "")


def _time(load: str, name: str, share: str) -> Callable[[Result], float | None]:
    def value(result: Result) -> float | None:
        times = result.get(load, {}).get("times", {})
        return 1000 * times[name][share] if name in times else None

    return value


def _handover_steps(result: Result) -> float | None:
    """The gap between tokens 1 and 2 (p99) in steps (ITL p50)."""
    gap, step = _time(STEADY, "handover_gap", "p99")(result), _time(STEADY, "itl", "p50")(result)
    return None if gap is None or step is None else gap / step


GOALS = (
    Goal("TTFT alone", "ms", _time(ALONE, "ttft", "p50"), 0.6, bound="ttft"),
    Goal("TPOT alone", "ms", _time(ALONE, "tpot", "p50"), 0.7, bound="tpot"),
    Goal("16 at once", "tok/s", lambda result: result.get(TOGETHER, {}).get("output_tokens_per_s"), 1.7, more=True),
    Goal("ITL p99 / p50", "", lambda result: result.get(STEADY, {}).get("itl_p99_over_p50"), 1.5, of_peer=False),
    Goal("tokens 1 to 2, p99", "steps", _handover_steps, 2.0, of_peer=False),
    Goal("goodput", "/s", lambda result: result.get(SEARCH, {}).get("goodput", {}).get("rate"), 2.0, more=True),
    Goal("ITL p99, long prompts", "ms", _time(LONG, "itl", "p99"), 0.1),
    Goal("start to first token", "s", lambda result: result.get("start_s"), 0.2),
)

"""What a window of the workload comes to: rate, burstiness, lengths, hits, and how sure each is. Pure."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, inf, sqrt
from statistics import fmean, pstdev, pvariance

from ...core.prefix import HASH_TOKENS
from ...core.workload import Recorded, Window
from ..load.fitting import gamma_shape
from ..load.slo import Slo
from ..load.workload import Arrival

ENOUGH = 10
"""Answers that tell how long those under way will be. What came before the window is of another load where that has just turned."""
_GOLDEN = 0.6180339887


@dataclass(frozen=True, slots=True)
class Mean:
    """`spread`: by how much it may be off by chance, as a share of it (one standard error)."""

    value: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        mean = fmean(values)
        return cls(mean, sqrt(pvariance(values, mean) / len(values)) / mean if mean else 0.0)


@dataclass(frozen=True, slots=True)
class Figures:
    """`rate`: requests per second. `burstiness`: shape of gamma arrivals, 1 is Poisson. `prompt`, `output`: tokens of a request.
    `hits`: the share of a prompt that was cached, and its standard error; of each prompt, not of all tokens, since a few long prompts would
    be most of those."""

    requests: int
    rate: Mean
    burstiness: float
    prompt: Mean
    output: Mean
    hits: float
    hits_error: float

    @classmethod
    def of(cls, arrivals: Sequence[Arrival], seconds: float) -> Figures:
        """At least two arrivals."""
        count = len(arrivals)
        shape = gamma_shape([later.at - earlier.at for earlier, later in pairwise(arrivals)])
        prompts = [arrival.prompt_tokens for arrival in arrivals]
        hits = [arrival.prefix_tokens / arrival.prompt_tokens for arrival in arrivals]
        return cls(
            count,
            # More regular than Poisson is not believed: it would make small changes of the rate look sure.
            Mean(count / seconds, 1 / sqrt(min(1.0, shape) * count)),
            shape,
            Mean.of(prompts),
            Mean.of([arrival.output_tokens for arrival in arrivals]),
            fmean(hits),
            pstdev(hits) / sqrt(count),
        )

    def as_json(self) -> dict[str, float]:
        values = {"rate": self.rate.value, "prompt_tokens": self.prompt.value, "output_tokens": self.output.value}
        rounded = {name: round(value, 3) for name, value in {**values, "hits": self.hits, "burstiness": self.burstiness}.items()}
        return {"requests": self.requests, **rounded}


def arrivals_in(window: Window, last: float = inf) -> list[Arrival]:
    """The `last` seconds of the window as a load that can be simulated: what has not ended gets an end.

    Its answer is as long as one of those seen that are longer than what it has so far: without that a window would hold few of the long
    ones. Seen is what came and ended in that time, or, where that is little, all that ended in it: in a queue longer than the window
    nothing that came in it has.
    What is cached of a prompt is a prefix that all share; of one that still waits, the share that was cached of the others.
    """
    seconds = min(last, window.seconds)
    recent = [each for each in window.requests if each.age <= seconds]
    ended = [each.output_tokens for each in recent if each.ended]
    if len(ended) < ENOUGH:
        ended = [each.output_tokens for each in window.requests if each.ended and _ended_ago(each) <= seconds]
    outputs = _whole_outputs(recent, ended)
    begun = [each for each in recent if each.ttft is not None]
    hits = sum(each.cached_tokens for each in begun) / max(1, sum(each.prompt_tokens for each in begun))
    found = []
    for number, (each, output) in enumerate(zip(recent, outputs, strict=True)):
        cached = each.cached_tokens if each.ttft is not None else int(each.prompt_tokens * hits) // HASH_TOKENS * HASH_TOKENS
        cached = min(cached, each.prompt_tokens)
        found.append(Arrival(number, seconds - each.age, each.prompt_tokens, output, prefix=min(1, cached), prefix_tokens=cached))
    return found


def lasting(arrivals: Sequence[Arrival], seconds: float, least: float) -> list[Arrival]:
    """The load of so many seconds again and again, for at least `least` seconds: a quarter more than is served makes a queue that takes
    half a minute to miss an SLO, and how long the load has been seen is no reason to believe that it ends."""
    turns = range(ceil(least / seconds))
    return [replace(each, number=turn * len(arrivals) + each.number, at=turn * seconds + each.at) for turn in turns for each in arrivals]


def _ended_ago(each: Recorded) -> float:
    """Seconds since its last token."""
    return each.age - (each.ttft or 0.0) - (each.tpot or 0.0) * (each.output_tokens - 1)


def _whole_outputs(requests: Sequence[Recorded], ended: Sequence[int]) -> list[int]:
    """Of those under way the shortest first, each then being one of those seen (Efron's redistribution to the right)."""
    outputs = [each.output_tokens for each in requests]
    seen = sorted(ended)
    under_way = [number for number, each in enumerate(requests) if not each.ended]
    for turn, number in enumerate(sorted(under_way, key=lambda number: outputs[number])):
        first = bisect_right(seen, outputs[number])
        if longer := len(seen) - first:
            outputs[number] = seen[first + int((turn + 1) * _GOLDEN % 1 * longer)]
        outputs[number] = max(1, outputs[number])
        insort(seen, outputs[number])
    return outputs


def attained(requests: Sequence[Recorded], slo: Slo) -> tuple[int, int]:
    """How many met the SLO, of those of which that is known: one that waits too long for its first token has missed it already."""
    met = known = 0
    for each in requests:
        late = each.ttft is None and slo.ttft is not None and each.age > slo.ttft
        if each.ended or late:
            known += 1
            times = ((slo.ttft, each.ttft), (slo.tpot, each.tpot))
            met += not late and all(limit is None or value is None or value <= limit for limit, value in times)
    return met, known

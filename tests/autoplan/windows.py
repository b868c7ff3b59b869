"""Windows of a drawn load, as a router would have recorded it."""

from __future__ import annotations

import random
from collections.abc import Iterator

from diptych.core.workload import Recorded, Window


def window(
    seconds: float, seed: int, *, rate: float = 5.0, burstiness: float = 1.0, prompt: float = 400, output: float = 20, spread: float = 0.8,
    hits: float = 0.0, ttft: float = 0.1, tpot: float = 0.02, running_s: float = 0.0,
) -> Window:  # fmt: skip
    """Lengths are log-normal with these medians; `hits`: the chance that half of a prompt was cached. Those that came in the last
    `running_s` seconds are under way."""
    draw = random.Random(f"window {seed}")

    def requests() -> Iterator[Recorded]:
        at = 0.0
        while (at := at + draw.gammavariate(burstiness, 1 / burstiness / rate)) < seconds:
            tokens, answer = (1 + int(draw.lognormvariate(0, spread) * median) for median in (prompt, output))
            cached = tokens // 2 if draw.random() < hits else 0
            age = seconds - at
            yield Recorded(age, tokens, cached, answer, ttft, tpot, ended=age > running_s)

    return Window(seconds, tuple(requests()))


def joined(first: Window, then: Window) -> Window:
    """One window behind another."""
    earlier = (
        Recorded(each.age + then.seconds, each.prompt_tokens, each.cached_tokens, each.output_tokens, each.ttft, each.tpot, each.ended)
        for each in first.requests
    )
    return Window(first.seconds + then.seconds, (*earlier, *then.requests))

"""How fast this machine is at the moment: two fixed pieces of work on all its cores. A machine that is shared has no speed of its own; ours
changes by a third within an hour and by a sixth within a minute, and what is compared with a profile is to be told apart from that."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diptych.cluster.planner.latency import StepTimes
from diptych.cluster.planner.profile import Parallelism, Profile
from diptych.cluster.planner.sharing import scaled

ROWS, WIDTH = 256, 2048
"""Of a product that a core computes from its caches, as a prompt's are."""
MATRICES = 16
"""Of the width squared, bfloat16: 128 MiB, more than any cache holds, as weights are that an answer's step reads."""
FOR_S = 0.5
"""Of each piece: some fifty runs."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Mean seconds of a piece: `products`, which is arithmetic, and `reads`, which is memory."""

    products: float
    reads: float

    def __str__(self) -> str:
        return f"{self.products:.2f} (products) and {self.reads:.2f} (reads)"

    def __truediv__(self, other: Pace) -> Pace:
        """How many times as long."""
        return Pace(self.products / other.products, self.reads / other.reads)

    @classmethod
    def between(cls, one: Pace, other: Pace) -> Pace:
        return cls((one.products + other.products) / 2, (one.reads + other.reads) / 2)


def pace() -> Pace:
    """Taken now, for a second in which nothing else should compute."""
    weights = [torch.ones(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(MATRICES)]
    rows = torch.ones(ROWS, WIDTH, dtype=torch.bfloat16)

    def products() -> None:
        torch.nn.functional.linear(rows, weights[0])

    def reads() -> None:
        for each in weights:
            torch.nn.functional.linear(rows[:1], each)

    return Pace(_mean(products), _mean(reads))


def _mean(run: Callable[[], None]) -> float:
    run()
    runs, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < FOR_S:
        run()
        runs += 1
    return taken / runs


def paced(profile: Profile, slower: Pace) -> Profile:
    """The profile as it would be on this machine while each piece takes so many times as long: steps that write answers read weights; all
    else computes."""

    def slow(times: StepTimes) -> StepTimes:
        read = scaled(times, slower.reads)
        return scaled(times, slower.products).model_copy(update={"decode": read.decode, "decode_large": read.decode_large})

    def each(known: Parallelism) -> Parallelism:
        counts = {name: {cores: slow(times) for cores, times in getattr(known, name).items()} for name in ("by_cores", "decode_by_cores")}
        return known.model_copy(update={"times": slow(known.times), **counts})

    around = {name: seconds * slower.products for name, seconds in profile.overheads.model_dump().items()}
    return profile.model_copy(
        update={"parallelisms": tuple(map(each, profile.parallelisms)), "overheads": profile.overheads.model_copy(update=around)}
    )

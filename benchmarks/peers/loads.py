"""What every server is asked, one load after another, in the words of `diptych bench`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

ALONE, TOGETHER, STEADY, LONG, SEARCH = "alone", "16 at once", "steady", "long prompts", "goodput"


@dataclass(frozen=True, slots=True)
class Load:
    """`arguments`: of `diptych bench`. `patient`: only for servers that answer requests together, as one that does not takes minutes."""

    name: str
    arguments: tuple[object, ...]
    patient: bool = True


def loads(options: argparse.Namespace) -> list[Load]:
    """In the order in which they are put on a server, with seeds of their own, so that no prompt is found in a cache. `options`: of
    `python -m diptych.benchmarks.peers`."""
    lengths = ("--input", options.input, "--output", options.output)
    judged = (*lengths, "--slo", options.slo)
    probes = ("--goodput", "--budget", options.budget, "--probe-requests", options.probe_requests, "--warm-up", 2)
    found = [
        Load(ALONE, ("--seed", 1, *lengths, "--rate", 0.25, "--constant", "--requests", 12, "--warm-up", 2), patient=False),
        Load(TOGETHER, ("--seed", 2, *lengths, "--rate", 1000, "--constant", "--requests", 16, "--warm-up", 0), patient=False),
        Load(STEADY, ("--seed", 3, *judged, "--rate", options.rate, "--requests", options.requests, "--warm-up", options.warm_up)),
        Load(LONG, ("--seed", 4, "--input", 1024, "--output", 64, "--rate", 0.25, "--requests", 24, "--warm-up", 2)),
    ]
    return [*found, Load(SEARCH, ("--seed", 5, *judged, "--rate", options.rate, *probes))] if options.budget else found

"""How long the planner itself takes: every pair of OPT-66B on a node of 8 A100s, and a long load on many workers.

    python -m diptych.benchmarks.planner.speed --lengths ../shared/distserve/sharegpt_lengths.json [--exhaustive] [--keep]

Seconds of the clock, and of CPU over all processes: beside other work the former say little.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from diptych.benchmarks.planner.replay import profile_of
from diptych.benchmarks.record import describe, keep, surroundings
from diptych.cluster.commands.planning import processes
from diptych.cluster.commands.simulating import few_collections
from diptych.cluster.load.choice import Load
from diptych.cluster.load.slo import Slo
from diptych.cluster.load.workload import limited, read_pairs
from diptych.cluster.planner.extrapolating import extended
from diptych.cluster.planner.goodput import Bench, Terms
from diptych.cluster.planner.plan_file import policies_for
from diptych.cluster.planner.policies import Policies, hardware_of
from diptych.cluster.planner.search import Outcome, Planner
from diptych.cluster.planner.shapes import Sample
from diptych.cluster.planner.site import Kind, Site, Space
from diptych.cluster.planner.world import World
from diptych.core.fleet import LocalPrefill, Phase

SLO_66B = Slo(ttft=2.5, tpot=0.15)
"""The paper's, of OPT-66B with ShareGPT (OSDI 2024, table 1)."""
TURNS = 3_000_000
PROCESSES = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Cost:
    """`memory_mib`: the most that this process has ever held, or one that it has started and that has ended."""

    wall_s: float
    cpu_s: float
    memory_mib: float


def timed(call: Callable[[], R]) -> tuple[R, Cost]:
    began, used = time.perf_counter(), _cpu()
    found = call()
    memory = max(resource.getrusage(who).ru_maxrss for who in PROCESSES) / 1024
    return found, Cost(round(time.perf_counter() - began, 2), round(_cpu() - used, 2), round(memory, 1))


def timed_apart(call: Callable[[], R]) -> tuple[R, Cost]:
    """In a process of its own, whose memory is nobody else's."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        return executor.submit(timed, call).result()


def yardstick() -> float:
    """Seconds of CPU of a loop in Python, 0.15 on this machine when it is idle: by how much neighbours slow whatever is timed beside it."""
    began, seen, total = time.process_time(), dict[int, int](), 0
    for turn in range(TURNS):
        total += turn
        seen[turn & 1023] = total
    return round(time.process_time() - began, 3)


def _cpu() -> float:
    """Of this process and of those that have ended."""
    ours = [resource.getrusage(who) for who in PROCESSES]
    return sum(each.ru_utime + each.ru_stime for each in ours)


def pairs_of_66b(load: Load, *, exhaustive: bool = False) -> Outcome:
    """DistServe's Algorithm 2 on one node of 8, with the times that were measured and those derived from them."""
    profile = profile_of("opt-66b-a100")
    profile = extended(profile, [tp for tp in range(1, 9) if profile.model.heads % tp == 0])
    sample = Sample(tuple(limited(load.arrivals(1.0), 2000, None)))
    policies = replace(policies_for(profile, profile.parallelisms[0].tp, sample), local_prefill=LocalPrefill.NEVER)
    link = profile.links["node"]
    bench = Bench(Site((Kind(profile, Space(1, 8), link, link),)), policies, Terms(load.arrivals, SLO_66B))
    with processes() as executor:
        return Planner(bench, sample, executor=executor, exhaustive=exhaustive).paired()


def many(load: Load, requests: int, workers: int = 64, rate: float = 100.0) -> World:
    """OPT-13B, half of the workers for each phase."""
    profile = profile_of("opt-13b-a100")
    hardware = [hardware_of(profile, phase, tp, 1, None, phase.value) for phase, tp in ((Phase.PREFILL, 2), (Phase.DECODE, 1))]
    policies = Policies(chunk_tokens=2048, prefill_running=64, decode_running=256, local_prefill=LocalPrefill.NEVER, most_running=None)
    world = World(profile, [each for each in hardware for _ in range(workers // 2)], policies, slo=Slo(ttft=0.2, tpot=0.1))
    with few_collections():
        world.run(islice(load.arrivals(rate), requests))
    return world


def seconds_of_many(load: Load, requests: int) -> float:
    """How long that load takes in the simulation."""
    return many(load, requests).agenda.now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, default=Path("../shared/distserve/sharegpt_lengths.json"), help="default: %(default)s")
    parser.add_argument("--exhaustive", action="store_true", help="also without leaving out what cannot win")
    parser.add_argument("--requests", type=int, nargs="*", default=[10_000, 100_000], help="of a load on 64 workers (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/planner-speed.json")
    options = parser.parse_args()
    where, results = surroundings(), dict[str, object]()
    yards = [yardstick()]
    load = Load(lengths=tuple(read_pairs(options.lengths.read_text(), options.lengths.name)))
    print(describe(where))
    for exhaustive in (False, True)[: 1 + options.exhaustive]:
        outcome, cost = timed(partial(pairs_of_66b, load, exhaustive=exhaustive))
        best = outcome.best
        assert best is not None
        name = "every pair of OPT-66B on 8 devices" + (", exhaustive" if exhaustive else "")
        print(f"{name}: {outcome.considered} considered, {outcome.simulated} searched, {cost.wall_s} s ({cost.cpu_s} s of CPU)")
        print(f"  {best.plan}: {best.rate:.3g} requests/s")
        results[name] = {"considered": outcome.considered, "searched": outcome.simulated, "best": str(best.plan), "rate": best.rate}
        results[name] |= asdict(cost)  # type: ignore[operator]
    for requests in options.requests:
        simulated, cost = timed_apart(partial(seconds_of_many, load, requests))
        name = f"{requests} requests on 64 workers"
        print(f"{name}: {cost.wall_s} s ({cost.cpu_s} s of CPU), {cost.memory_mib} MiB; {simulated:.0f} s simulated")
        results[name] = asdict(cost) | {"simulated_s": simulated}
        yards.append(yardstick())
    print(f"a loop of {TURNS} turns meanwhile: {', '.join(map(str, yards))} s of CPU")
    if options.keep:
        print(f"kept in {keep('planner-speed', where, {'yardstick_s': yards}, results)}")


if __name__ == "__main__":
    main()

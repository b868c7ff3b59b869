"""Runs measured by others, simulated with our schedulers, and how far apart the two are."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diptych.benchmarks.record import percentile
from diptych.cluster.load.workload import Arrival
from diptych.cluster.planner.life import Life
from diptych.cluster.planner.policies import Policies, workers_of
from diptych.cluster.planner.profile import Profile, read_profile
from diptych.cluster.planner.world import World
from diptych.cluster.supervising.config_file import read_config
from diptych.core.config import ClusterConfig

HERE = Path(__file__).parent
SLO = (0.2, 0.1)
"""TTFT and TPOT in seconds."""
PUBLISHED = HERE / "c21d11.yaml"
"""A plan with the flags of the published runs (facts.json, `engine_flags_in_evaluation`)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request, seconds."""

    prompt_tokens: int
    output_tokens: int
    at: float
    ttft: float
    tpot: float

    @property
    def met(self) -> bool:
        return self.ttft <= SLO[0] and self.tpot <= SLO[1]


def read_traces(path: Path) -> dict[str, list[Row]]:
    """Runs by name; rows of prompt and output length, issue time, TTFT and TPOT, times in milliseconds."""
    document: dict[str, Any] = json.loads(path.read_text())
    return {
        name: [Row(prompt, output, at / 1000, ttft / 1000, tpot / 1000) for prompt, output, at, ttft, tpot in rows]
        for name, rows in document["traces"].items()
    }


def profile_of(name: str = "opt-13b-a100") -> Profile:
    return read_profile(HERE / f"{name}.json")


def replay(profile: Profile, rows: Sequence[Row], plan: ClusterConfig) -> tuple[list[Row], World]:
    """The same requests at the same times on the plan's workers.

    One policy of theirs we lack: when memory is short they swap a request out and in, we compute it again, beside the others' steps.
    `Comparison.preemptions` says how often, and so which runs that spoils: in a saturated one each slows everybody by some 0.1 s.
    """
    lives: list[Life] = []
    world = World(profile, workers_of(plan, profile), Policies.of(plan), on_end=lives.append)
    world.run(Arrival(number, row.at, row.prompt_tokens, row.output_tokens) for number, row in enumerate(rows))
    world.check()
    found = list(rows)
    for life in lives:
        assert life.ttft is not None
        found[life.arrival.number] = replace(rows[life.arrival.number], ttft=life.ttft, tpot=life.tpot or 0.0)
    return found, world


@dataclass(frozen=True, slots=True)
class Comparison:
    """Measured and simulated figures of one run: attainment as shares, times in seconds, by name."""

    name: str
    requests: int
    measured: dict[str, float]
    simulated: dict[str, float]
    preemptions: int

    @property
    def attainment_error(self) -> float:
        """Percentage points, simulated less measured."""
        return 100 * (self.simulated["attainment"] - self.measured["attainment"])

    def ratio(self, figure: str) -> float:
        return self.simulated[figure] / self.measured[figure]

    @property
    def saturated(self) -> bool:
        """Requests waited for memory: more than one in twenty had a TPOT of three times the median."""
        return self.measured["tpot p95"] > 3 * self.measured["tpot p50"]

    def misses(self) -> list[str]:
        """What is outside of what is promised, as sentences."""
        wrong = []
        for figure in FIGURES:
            allowed = 1.5 if self.saturated else 1.15
            ratio = self.ratio(figure)
            if not 1 / allowed <= ratio <= allowed and (self.saturated or not 0.85 <= ratio <= 1.15):
                wrong.append(f"{self.name}: {figure} is {ratio:.2f} of what was measured")
        return wrong


FIGURES = ("ttft p50", "ttft p90", "tpot p50", "tpot p90")


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Attainment, and percentiles by nearest rank."""
    found = {"attainment": sum(row.met for row in rows) / len(rows)}
    for name in ("ttft", "tpot"):
        values = [getattr(row, name) for row in rows]
        found |= {f"{name} p{share}": percentile(values, share / 100) for share in (50, 90, 95)}
    return found


def compare(name: str, profile: Profile, rows: Sequence[Row]) -> Comparison:
    simulated, world = replay(profile, rows, read_config(PUBLISHED, {}))
    preemptions = world.counters().get("diptych_worker_preemptions_total", 0)
    return Comparison(name, len(rows), figures(rows), figures(simulated), int(preemptions))


def root_mean_square(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error * error for error in errors) / len(errors))

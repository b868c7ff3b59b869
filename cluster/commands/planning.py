"""What `diptych plan` does: profiles and loads read, progress shown, the plan written, and why the rest lost."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from ...core.config import load_config
from ...core.errors import ConfigError, DiptychError
from ...core.fleet import LocalPrefill, Phase
from ..load.choice import Load
from ..load.mix import Mix, parse_mix
from ..load.slo import parse_slo
from ..load.workload import limited, read_pairs
from ..planner.extrapolating import extended
from ..planner.goodput import Arrivals, Bench, Terms
from ..planner.plan_file import config_of, policies_for
from ..planner.profile import Profile, read_profile
from ..planner.search import AT_ONCE, Outcome, Planner, Space
from ..planner.shapes import Loss, Sample, Shape, idle_seconds
from ..planner.trying import Scored
from .simulating import link_of, write_text

SAMPLE = 2000
"""Requests looked at for what is known without a simulation."""
SHOWN = 8
"""Runners-up, and plans of each reason that lost."""
_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Planning:
    """One call of the command. `paired`: keep a prefill and a decode worker on each node (low affinity)."""

    profile: Profile
    bench: Bench
    space: Space
    sample: Sample
    paired: bool
    source: str | None

    @classmethod
    def begin(
        cls, profile: Path, slo: str, arrivals: Arrivals, space: Space, *, target: float, confidence: float, most: int, link: str | None,
        paired: bool, source: str | None, cost: float | None, seed: int, derive: bool,
    ) -> Planning:  # fmt: skip
        known = read_profile(profile)
        if derive:
            known = _derived(known, space)
        if cost is not None:
            known = known.model_copy(update={"device": known.device.model_copy(update={"cost_per_hour": cost})})
        limits = parse_slo(slo)
        if limits.ttft is None or limits.tpot is None:
            raise ConfigError("--slo: a plan needs a limit for both ttft and tpot, as in ttft=0.2s,tpot=0.1s.", field="slo")
        sample = Sample(tuple(limited(arrivals(1.0, seed), SAMPLE, None)))
        policies = replace(policies_for(known, known.parallelisms[0].tp, sample), local_prefill=LocalPrefill.NEVER)
        terms = Terms(arrivals, limits, target, confidence, most, seed=seed)
        return cls(known, Bench(known, policies, link_of(known, link), terms), space, sample, paired, source)

    def run(self, rate: float | None, out: Path | None, plot: Path | None, *, exhaustive: bool) -> Outcome:
        """Search, print, write; `DiptychError` if nothing serves, with what binds and the nearest that works."""
        with _err.status("planning") as status, ProcessPoolExecutor(_processes(), get_context("spawn")) as processes:
            planner = Planner(
                self.bench,
                self.space,
                self.sample,
                executor=processes,
                exhaustive=exhaustive,
                shown=lambda what: status.update(f"trying {what}"),
            )
            outcome = planner.paired(rate) if self.paired else planner.apart(rate)
        if outcome.best is None:
            self._show_lost(outcome)
            raise DiptychError(self._why_none(outcome, rate))
        _out.print(_table(outcome, self.profile))
        self._show_lost(outcome)
        text = self._file(outcome.best)
        if out is not None:
            write_text(out, text)
            _out.print(f"{out}: diptych up -f {out}", markup=False)
        else:
            _out.print("\n" + text, markup=False)
        if plot is not None:
            from .planner_plot import plot_front

            plot_front(plot, outcome, f"{self.profile.model.name} on {self.profile.device.name}: {self.bench.terms.slo}")
        if self.profile.estimate:
            _out.print(f"The times are an estimate ({self.profile.source}); `diptych profile` measures them.", markup=False)
        return outcome

    def _file(self, best: Scored) -> str:
        values = config_of(best.plan, self.profile, self.bench.policies, self.source)
        load_config(values)
        where = "A prefill and a decode worker of each pair belong on one node.\n# " if self.paired else ""
        head = (
            f"# {best.plan}: {best.rate:.3g} requests/s within {self.bench.terms.slo}, simulated.\n# {where}From: {self.profile.source}\n"
        )
        return head + yaml.safe_dump(values, sort_keys=False)

    def _show_lost(self, outcome: Outcome) -> None:
        for loss in Loss:
            lost = [each for each in outcome.lost if each.loss is loss]
            if lost:
                _out.print(f"lost by {loss}: {len(lost)}", markup=False)
            for each in lost[:SHOWN]:
                _out.print(f"  {each.what}: {each.why}", markup=False)

    def _why_none(self, outcome: Outcome, rate: float | None) -> str:
        """Which constraint binds, and the nearest that works."""
        terms, profile = self.bench.terms, self.profile
        reasons = {each.loss for each in outcome.lost}
        shapes = [
            shape
            for shape in self.space.shapes(profile, self.space.devices)
            if profile.parallelism(shape.tp) and profile.kv_tokens(shape.tp, shape.pp) >= self.sample.longest
        ]
        if not shapes:
            need = (profile.model.weight_bytes + self.sample.longest * profile.model.kv_token_bytes) / (0.9 * profile.device.memory_bytes)
            return (
                f"No plan: {profile.model.name} does not fit into {self.space.devices} × {profile.device.name}. Memory binds: a worker "
                f"takes at least {int(need) + 1} devices, and there must be one of each phase."
            )
        if reasons <= {Loss.SLO, Loss.MEMORY, Loss.NO_PROFILE} and (near := self._nearest(shapes)):
            return f"No plan: {near}"
        wanted = f"{rate:g} requests/s" if rate is not None else "any rate"
        return f"No plan of at most {self.space.devices} devices serves {wanted} with {terms.target:.0%} within {terms.slo}."

    def _nearest(self, shapes: list[Shape]) -> str | None:
        slo, target = self.bench.terms.slo, self.bench.terms.target
        for phase, limit, name in ((Phase.PREFILL, slo.ttft, "TTFT"), (Phase.DECODE, slo.tpot, "TPOT")):
            assert limit is not None
            idle = {shape: idle_seconds(self.profile, phase, shape, self.sample, target) for shape in shapes}
            best = min(idle, key=lambda shape: idle[shape])
            if idle[best] > limit:
                return (
                    f"the {name} limit of {1000 * limit:.0f} ms binds: one request alone takes longer on every shape. The nearest that "
                    f"works is {1000 * idle[best]:.0f} ms, with {best}."
                )
        return None


def _processes() -> int:
    """One for each core that this process may use, up to as many plans as are tried at once."""
    return min(AT_ONCE, len(os.sched_getaffinity(0)))


def _derived(known: Profile, space: Space) -> Profile:
    """With times for every tp that splits the model; says how far off they may be."""
    full = extended(known, [tp for tp in range(1, space.per_node + 1) if known.model.heads % tp == 0])
    for each in full.parallelisms:
        if known.parallelism(each.tp) is None:
            _err.print(f"tp {each.tp}: times derived from the others, ± {each.error:.0%}", markup=False)
    return full


def load_for(workload: Path | None, lengths: Path | None, burstiness: float, *, input: str, output: str) -> Arrivals:
    """The load as a function of rate and seed. A trace has its own rate, so plans take its lengths."""
    if workload is not None and lengths is not None:
        raise ConfigError("Give --workload or --lengths, not both.", field="workload")
    if workload is not None and workload.suffix == ".json":
        mix: Mix = parse_mix(_text(workload), workload.name)
        return mix.arrivals
    if workload is not None:
        from .simulating import lines_of

        pairs = tuple((arrival.prompt_tokens, arrival.output_tokens) for arrival in lines_of(workload))
        load = Load(lengths=pairs, burstiness=burstiness)
    elif lengths is not None:
        load = Load(lengths=tuple(read_pairs(_text(lengths), lengths.name)), burstiness=burstiness)
    else:
        load = Load(input=input, output=output, burstiness=burstiness)
    load.check()
    return load.arrivals


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.", field="workload") from None


def _table(outcome: Outcome, profile: Profile) -> Table:
    front = {id(each) for each in outcome.front()}
    table = Table("", "plan", "devices", "requests/s", "per device", "cost/h", "attained", box=None, pad_edge=False, header_style="bold")
    for number, each in enumerate(outcome.scored[: 1 + SHOWN]):
        probe = each.probe
        attained = "" if probe is None else f"{probe.share:.1%} ({probe.low:.1%} to {probe.high:.1%})"
        mark = "best" if number == 0 else ""
        cells: list[Any] = [f"{each.rate:.3g}", f"{each.per_device:.3g}", f"{each.cost_per_hour:g}", attained]
        table.add_row(mark + (" *" if id(each) in front else ""), str(each.plan), str(each.plan.devices), *cells)
    table.caption = f"* on the Pareto front of cost and rate. {outcome.considered} plans considered, {outcome.simulated} simulations."
    return table

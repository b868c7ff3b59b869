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
from ...core.fleet import LocalPrefill
from ..load.choice import Load
from ..load.mix import Mix, parse_mix
from ..load.slo import parse_slo
from ..load.workload import limited, read_pairs
from ..planner.extrapolating import extended
from ..planner.goodput import Arrivals, Bench, Terms
from ..planner.nearest import nearest
from ..planner.plan_file import config_of, policies_for
from ..planner.profile import Profile, read_profile
from ..planner.search import AT_ONCE, Outcome, Planner, Space
from ..planner.shapes import Loss, Sample
from ..planner.trying import Scored, Trier
from .simulating import collect_rarely, link_of, write_text

SAMPLE = 2000
"""Requests looked at for what is known without a simulation."""
MORE = 16
"""Times as many devices as there are is the most that is looked at for the nearest that works."""
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
        policies = policies_for(known, known.parallelisms[0].tp, sample)
        policies = replace(policies, local_prefill=LocalPrefill.NEVER, paired=paired)
        terms = Terms(arrivals, limits, target, confidence, most, seed=seed)
        return cls(known, Bench(known, policies, link_of(known, link), terms), space, sample, paired, source)

    def run(self, rate: float | None, out: Path | None, plot: Path | None, *, exhaustive: bool) -> Outcome:
        """Search, print, write; `DiptychError` if nothing serves, with what binds and the nearest that works."""
        with _err.status("planning") as status, processes() as executor:
            planner = Planner(
                self.bench,
                self.space,
                self.sample,
                executor=executor,
                exhaustive=exhaustive,
                shown=lambda what: status.update(f"trying {what}"),
            )
            outcome = planner.paired(rate) if self.paired else planner.apart(rate)
        if outcome.best is None:
            self._show_lost(outcome)
            raise DiptychError(self._why_none(planner, outcome, rate))
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
        where = "Workers of one number are a pair, on one node.\n# " if self.paired else ""
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

    def _why_none(self, planner: Planner, outcome: Outcome, rate: float | None) -> str:
        """Which constraint binds, and the nearest that works, by simulation."""
        model, device, devices = self.profile.model.name, self.profile.device.name, self.space.devices
        plans = planner.fitting()
        if not plans:
            known = {Loss.MEMORY: "memory", Loss.NO_PROFILE: "what the profile has times for"}
            binds = " and ".join(name for loss, name in known.items() if any(each.loss is loss for each in outcome.lost)) or "devices"
            return f"No plan: {binds} binds, {model} does not fit twice, once for each phase, on {devices} × {device}. {self._room()}"
        short = [each.plan for each in outcome.lost if each.plan is not None]
        if rate is not None and short:
            step = (1, 1) if self.paired else None
            found, _ = Trier(self.bench).meet(min(short, key=lambda plan: plan.devices), rate, MORE * devices, step)
            works = f"The nearest that works takes {found.plan.devices}: {found.plan}." if isinstance(found, Scored) else ""
            return f"No plan: devices bind, {rate:g} requests/s take more than {devices} within {self.bench.terms.slo}. {works}".rstrip()
        near = nearest(self.bench, plans, self.sample)
        if near is None:
            return f"No plan: within {self.bench.terms.slo} none serves, nor with far longer limits."
        limits = {"TTFT": self.bench.terms.slo.ttft, "TPOT": self.bench.terms.slo.tpot}
        named = " and ".join(f"the {name} limit of {1000 * (limits[name] or 0):g} ms" for name in near.binding)
        return (
            f"No plan: {named} {'bind' if len(near.binding) > 1 else 'binds'}: requests take longer on every shape, even one at a time. "
            f"The nearest that works is {near.limits}, with {near.plan}."
        )

    def _room(self) -> str:
        """On how many devices a pair fits; of the same nodes if need be."""
        for factor in range(1, MORE + 1):
            for space in (Space(self.space.nodes, self.space.per_node * factor), Space(self.space.nodes * factor, self.space.per_node)):
                if plans := Planner(self.bench, space, self.sample).fitting():
                    least = min(plans, key=lambda plan: plan.devices)
                    return f"The nearest that fits takes {least.devices} of {space.nodes} × {space.per_node}: {least}."
        return ""


def processes() -> ProcessPoolExecutor:
    """Where plans are tried: one for each core that this process may use, up to as many plans as are tried at once."""
    return ProcessPoolExecutor(min(AT_ONCE, len(os.sched_getaffinity(0))), get_context("spawn"), collect_rarely)


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

"""What `diptych plan` does: profiles and loads read, progress shown, the plan written, and why the rest lost."""

from __future__ import annotations

import math
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
from ...engine.location import DEMO_NAME
from ..load.choice import Load
from ..load.goodput import Probe
from ..load.mix import Mix, parse_mix
from ..load.retimed import Retimed
from ..load.slo import parse_slo
from ..load.workload import limited, read_pairs
from ..planner.goodput import Arrivals, Bench, Terms
from ..planner.nearest import nearest
from ..planner.plan_file import config_of, policies_for_all
from ..planner.profile import SHARE_OF_MEMORY
from ..planner.search import AT_ONCE, Outcome, Planner
from ..planner.shapes import Loss, Sample
from ..planner.site import Kind, Site
from ..planner.trying import Scored, Trier
from .devices import Asked
from .simulating import collect_rarely, write_text

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

    site: Site
    bench: Bench
    sample: Sample
    paired: bool
    source: str | None

    @classmethod
    def begin(
        cls, devices: Asked, slo: str, arrivals: Arrivals, *, target: float, confidence: float, most: int, paired: bool, source: str | None,
        seed: int,
    ) -> Planning:  # fmt: skip
        site = devices.site()
        if paired and len(site.kinds) > 1:
            _err.print(
                "A pair shares a node, and so one kind of device: plans that mix kinds are only searched with --affinity high.",
                markup=False,
            )
        limits = parse_slo(slo)
        if limits.ttft is None or limits.tpot is None:
            raise ConfigError("--slo: a plan needs a limit for both ttft and tpot, as in ttft=0.2s,tpot=0.1s.", field="slo")
        sample = Sample(tuple(limited(arrivals(1.0, seed), SAMPLE, None)))
        _check_context(site, sample, target)
        policies = replace(policies_for_all(site, sample), local_prefill=LocalPrefill.NEVER, paired=paired)
        terms = Terms(arrivals, limits, target, confidence, most, seed=seed)
        return cls(site, Bench(site, policies, terms), sample, paired, source)

    @property
    def model(self) -> str:
        return self.site.kinds[0].profile.model.name

    def run(self, rate: float | None, out: Path | None, plot: Path | None, *, exhaustive: bool) -> Outcome:
        """Search, print, write; `DiptychError` if nothing serves, with what binds and the nearest that works."""
        with _err.status("planning") as status, processes() as executor:
            planner = Planner(
                self.bench,
                self.sample,
                executor=executor,
                exhaustive=exhaustive,
                shown=lambda what: status.update(f"trying {what}"),
            )
            if self.site.host is not None:
                outcome = planner.on_host(rate, paired=self.paired)
            else:
                outcome = planner.paired(rate) if self.paired else planner.apart(rate)
            lasting = planner.lasting(outcome.best) if outcome.best is not None and rate is None else None
        if outcome.best is None:
            self._show_lost(outcome)
            raise DiptychError(self._why_none(planner, outcome, rate))
        _out.print(_table(outcome, self.site))
        if rate is None:
            _out.print(_lasting_said(lasting), markup=False)
        self._show_lost(outcome)
        text = self._file(outcome.best, outcome.best.rate if lasting is None else lasting.rate)
        if out is not None:
            write_text(out, text)
            joined = " --address RAY" if sum(kind.space.nodes for kind in self.site.kinds) > 1 else ""
            _out.print(f"{out}: diptych up -f {out}{joined}", markup=False)
        else:
            _out.print("\n" + text, markup=False)
        if plot is not None:
            from .planner_plot import plot_front

            plot_front(plot, outcome, f"{self.model} on {self.site.names}: {self.bench.terms.slo}")
        for profile in (kind.profile for kind in self.site.kinds):
            if profile.estimate:
                what = f"The times of {profile.device.name} are an estimate ({profile.source}); `diptych profile` measures them."
                _out.print(what, markup=False)
        return outcome

    def _file(self, best: Scored, rate: float) -> str:
        prefill, decode = (kind.profile for kind in self.site.of(best.plan))
        name, source = prefill.model.name, self.source or prefill.model.source
        unsaid = source is None and name != DEMO_NAME
        values = config_of(best.plan, prefill, self.bench.policies, name if unsaid else source, decode)
        load_config(values)
        lines = [f"{best.plan}: {rate:.3g} requests/s within {self.bench.terms.slo}, simulated."]
        if self.paired:
            lines.append("Workers of one number are a pair, on one node.")
        if best.plan.prefill.device:
            names = " and ".join(dict.fromkeys((best.plan.prefill.device, best.plan.decode.device)))
            lines.append(f"For a Ray cluster with nodes of {names}: diptych up -f FILE --address RAY")
        if unsaid:
            lines.append("The profile does not say where the model is (model.source), so its name is taken; --model says it.")
        lines.append(f"From: {'; '.join(dict.fromkeys((prefill.source, decode.source)))}")
        return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(values, sort_keys=False)

    def _show_lost(self, outcome: Outcome) -> None:
        for loss in Loss:
            lost = [each for each in outcome.lost if each.loss is loss]
            if lost:
                _out.print(f"lost by {loss}: {len(lost)}", markup=False)
            for each in lost[:SHOWN]:
                _out.print(f"  {each.what}: {each.why}", markup=False)

    def _why_none(self, planner: Planner, outcome: Outcome, rate: float | None) -> str:
        """Which constraint binds, and the nearest that works, by simulation."""
        model, there = self.model, self.site
        plans = planner.fitting(paired=self.paired)
        if not plans:
            known = {Loss.MEMORY: "memory", Loss.NO_PROFILE: "what the profile has times for"}
            binds = " and ".join(name for loss, name in known.items() if any(each.loss is loss for each in outcome.lost)) or "devices"
            return f"No plan: {binds} binds, {model} does not fit twice, once for each phase, on {there}. {self._room()}"
        short = [each.plan for each in outcome.lost if each.plan is not None]
        if rate is not None and short:
            step = (1, 1) if self.paired else None
            found, _ = Trier(self.bench).meet(min(short, key=there.units), rate, there.multiplied(MORE), step)
            works = f"The nearest that works takes {there.amount(found.plan)}: {found.plan}." if isinstance(found, Scored) else ""
            return f"No plan: devices bind, {rate:g} requests/s take more than {there} within {self.bench.terms.slo}. {works}".rstrip()
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
            for site in (self.site.multiplied(factor, per_node=True), self.site.multiplied(factor)):
                if plans := Planner(replace(self.bench, site=site), self.sample).fitting(paired=self.paired):
                    least = min(plans, key=site.units)
                    spaces = {name: kind.space for name, kind in zip(least.kinds, site.of(least), strict=True)}
                    of = " and ".join(f"{space.nodes} × {space.per_node}{f' {name}' if name else ''}" for name, space in spaces.items())
                    return f"The nearest that fits takes {site.amount(least)} of {of}: {least}."
        return " ".join(map(self._lack, self.site.kinds))

    def _lack(self, kind: Kind) -> str:
        """By weights alone."""
        device, weights = kind.profile.device, kind.profile.model.weight_bytes
        least = 2 * math.ceil(weights / device.memory_bytes / SHARE_OF_MEMORY)
        return (
            f"Nor does it on {MORE} times as many: its weights are {weights / 1e9:.0f} GB and a {device.name} has "
            f"{device.memory_bytes / 1e9:.0f}, so it takes {least} for the weights of both phases, at a tp of the profile."
        )


def _check_context(site: Site, sample: Sample, target: float) -> None:
    """`ConfigError` if more requests are longer than the model's context than may miss: whatever serves refuses them."""
    model = site.kinds[0].profile.model
    over = sum(each.prompt_tokens + each.output_tokens > model.max_context for each in sample.arrivals) / len(sample.arrivals)
    if over > 1 - target:
        raise ConfigError(
            f"{over:.0%} of the requests are longer than the context of {model.name}, {model.max_context} tokens (the longest has "
            f"{sample.longest} of prompt and answer). They would be refused, so no plan serves {target:.0%}.",
            field="workload",
        )


def processes() -> ProcessPoolExecutor:
    """Where plans are tried: one for each core that this process may use, up to as many plans as are tried at once."""
    return ProcessPoolExecutor(min(AT_ONCE, len(os.sched_getaffinity(0))), get_context("spawn"), collect_rarely)


def load_for(workload: Path | None, lengths: Path | None, burstiness: float, *, input: str, output: str) -> Arrivals:
    """The load as a function of rate and seed. A trace has its own rate, so its times are scaled to those that are tried."""
    if workload is not None and lengths is not None:
        raise ConfigError("Give --workload or --lengths, not both.", field="workload")
    if workload is not None and burstiness != 1.0:
        raise ConfigError(f"{workload.name} says how its requests come: leave --burstiness out.", field="burstiness")
    if workload is not None and workload.suffix == ".json":
        mix: Mix = parse_mix(_text(workload), workload.name)
        return mix.arrivals
    if workload is not None:
        from .simulating import lines_of

        return Retimed.of(tuple(lines_of(workload)), workload.name).arrivals
    if lengths is not None:
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


def _table(outcome: Outcome, site: Site) -> Table:
    front, per = {id(each) for each in outcome.front()}, f"per {site.unit}"
    table = Table("", "plan", "devices", "requests/s", per, "cost/h", "attained", box=None, pad_edge=False, header_style="bold")
    for number, each in enumerate(outcome.scored):
        if number > SHOWN and id(each) not in front:
            continue
        probe = each.probe
        attained = "" if probe is None else f"{probe.share:.1%} ({probe.low:.1%} to {probe.high:.1%})"
        mark = "best" if number == 0 else ""
        cells: list[Any] = [f"{each.rate:.3g}", f"{each.rate / site.units(each.plan):.3g}", f"{each.cost_per_hour:g}", attained]
        devices = site.amount(each.plan) if each.plan.prefill.device else str(each.plan.devices)
        table.add_row(mark + (" *" if id(each) in front else ""), str(each.plan), devices, *cells)
    table.caption = f"{_front_said(outcome, site)} {outcome.considered} plans considered, {outcome.simulated} simulations."
    return table


def _lasting_said(lasting: Probe | None) -> str:
    """Plans are compared by one draw of the load, and the best one's rate is that which this draw flatters."""
    if lasting is None:
        return "With another draw of the load the best serves less than half of its rate: ask for longer runs (--most)."
    share = f"{lasting.share:.1%} of {lasting.total} requests attain"
    return f"With a draw of the load that the search has not seen the best serves {lasting.rate:.3g} requests/s: {share}."


def _front_said(outcome: Outcome, site: Site) -> str:
    """Of which plans it is one: what was given up for what it serves per device may serve more, for more."""
    cut = sum(each.loss is Loss.DOMINATED for each in outcome.lost)
    given_up = f"; {cut} that could not win per {site.unit} were not, and may belong on it" if cut else ""
    return f"* on the Pareto front of cost and rate of the plans that were searched to their end{given_up}."

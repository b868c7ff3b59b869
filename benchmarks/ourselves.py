"""How right is the simulator about this machine? Six loads, from idle to beyond saturation, simulated with this machine's profile and then
served, with prefill and decode apart and with one worker for both.

    python -m diptych.benchmarks.ourselves --profile P.json [--seconds 20] [--repeats 3] [--slo ttft=1s,tpot=50ms] [--plot FILE.png]

`P.json` is what `diptych profile` has just written here; without it this machine is profiled first. The same requests come at the same
times in both. Rates are shares of what the set-up can do by the simulation. Promised: attainment within 5 points, or the offered rate
within 5 %, goodput within 10 %, TTFT and TPOT (p50 and p90) within 15 %; what is not is listed.

How fast the machine is (`pace`) is taken when the profile is there and between the loads. A second table has each load simulated at the
pace that it met: what is off there too is the simulator's, the rest is the machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from diptych.benchmarks.pace import Pace, pace, paced
from diptych.benchmarks.record import RESULTS, describe, keep, surroundings
from diptych.cluster.commands.preparing import prepare_here
from diptych.cluster.commands.up import Served as Up
from diptych.cluster.commands.while_up import serve, settings
from diptych.cluster.load.answer import Answer
from diptych.cluster.load.choice import Load
from diptych.cluster.load.measure import measure
from diptych.cluster.load.server import Server, find_server
from diptych.cluster.load.slo import Slo, parse_slo
from diptych.cluster.load.summary import percentile
from diptych.cluster.load.workload import Arrival, limited
from diptych.cluster.planner.life import Life
from diptych.cluster.planner.policies import Policies, workers_of
from diptych.cluster.planner.profile import Profile, read_profile
from diptych.cluster.planner.world import World
from diptych.cluster.profiling.measuring import profile_here
from diptych.core.config import ClusterConfig, load_config

SHARES = (0.15, 0.4, 0.6, 0.8, 0.95, 1.25)
"""Of what a set-up can do."""
AT_ONCE = 150
"""Requests that come at once when that is found out."""
WARM_UP = 4
"""Requests one after another before a load, and not counted."""
FEWEST = 16
"""Requests of a load: a slow one lasts for longer than `--seconds`, so that it has percentiles."""
TIMEOUT_S = 300.0
POINTS, RATE, GOODPUT, TIMES = 0.05, 0.05, 0.10, 0.15
"""What is promised."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one load. Seconds; `attainment` as a share, `goodput` in requests per second from the first sending to the last end."""

    attainment: float
    goodput: float
    ttft_p50: float
    ttft_p90: float
    tpot_p50: float
    tpot_p90: float

    @classmethod
    def of(cls, requests: Iterable[tuple[float | None, float | None, bool]], seconds: float) -> Figures:
        """TTFT, TPOT, and whether both limits were met, of each request."""
        rows = list(requests)
        met = sum(each[2] for each in rows)
        ttft, tpot = (sorted(value for row in rows if (value := row[index]) is not None) for index in (0, 1))
        shares = [percentile(values, share) for values in (ttft, tpot) for share in (0.5, 0.9)]
        return cls(met / len(rows), met / seconds, *shares)

    @classmethod
    def median(cls, runs: Sequence[Figures]) -> Figures:
        return cls(*(statistics.median(getattr(run, name) for run in runs) for name in cls.__slots__))


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was served. Seconds: `at` when it was to be sent and `sent` when it was, of its load; the others since then."""

    at: float
    prompt_tokens: int
    output_tokens: int
    sent: float
    ttft: float | None
    tpot: float | None
    ended: float
    failed: bool

    @classmethod
    def of(cls, answer: Answer) -> Asked:
        at, failed = answer.arrival, answer.error is not None
        return cls(at.at, at.prompt_tokens, at.output_tokens, answer.sent, answer.ttft, answer.tpot, answer.ended, failed)


@dataclass(frozen=True, slots=True)
class Served:
    """One load of a set-up, each time that it was served; the requests of a run are in the order of their times. `slower`: how many times
    as long the machine took for each run as for the profile, if that is known."""

    setup: str
    rate: float
    runs: tuple[tuple[Asked, ...], ...]
    slower: tuple[Pace, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """One load. `around`: attainment simulated at rates `RATE` below and above."""

    setup: str
    rate: float
    requests: int
    simulated: Figures
    measured: Figures
    runs: Sequence[Figures]
    around: tuple[float, float]

    def misses(self) -> list[str]:
        """What is beyond what is promised, as sentences."""
        return [f"{self.setup} at {self.rate:.2f}/s: {name} simulated {s:.3g}, measured {m:.3g}" for name, s, m in self._beyond()]

    def _beyond(self) -> Iterable[tuple[str, float, float]]:
        simulated, measured = self.simulated, self.measured
        low, high = sorted((*self.around, simulated.attainment))[:: len(self.around)]
        if abs(simulated.attainment - measured.attainment) > POINTS and not low <= measured.attainment <= high:
            yield "attainment", simulated.attainment, measured.attainment
        for name in Figures.__slots__[1:]:
            s, m = getattr(simulated, name), getattr(measured, name)
            if abs(s - m) > (GOODPUT if name == "goodput" else TIMES) * m:
                yield name, s, m


def load_of(options: argparse.Namespace) -> Load:
    found = Load(input=options.input, output=options.output, seed=options.seed)
    found.check()
    return found


def simulated(profile: Profile, config: ClusterConfig, arrivals: Iterable[Arrival], slo: Slo) -> Figures:
    lives: list[Life] = []
    world = World(profile, workers_of(config, profile), Policies.of(config), slo=slo, on_end=lives.append)
    world.run(arrivals)
    begun = min(life.arrival.at for life in lives)
    ended = max(life.last for life in lives if life.last is not None)
    return Figures.of(((life.ttft, life.tpot, world.meets(life)) for life in lives), ended - begun)


def capacity(profile: Profile, config: ClusterConfig, load: Load) -> float:
    """Requests per second that it serves when there are always more."""
    ended: list[float] = []
    world = World(profile, workers_of(config, profile), Policies.of(config), on_end=lambda life: ended.append(life.last or 0.0))
    world.run(
        Arrival(number, 0.0, each.prompt_tokens, each.output_tokens) for number, each in enumerate(islice(load.arrivals(1.0), AT_ONCE))
    )
    half = sorted(ended)[AT_ONCE // 4 : 3 * AT_ONCE // 4]
    return (len(half) - 1) / (half[-1] - half[0])


def measured(run: Sequence[Asked], slo: Slo) -> Figures:
    seconds = max(each.sent + each.ended for each in run) - min(each.sent for each in run)
    return Figures.of(((each.ttft, each.tpot, not each.failed and slo.within(each.ttft, each.tpot, each.ended)) for each in run), seconds)


def values_of(setup: str, options: argparse.Namespace) -> dict[str, Any]:
    return settings(prefill=1 if setup == "apart" else 0, decode=1, model=options.model, dtype=options.dtype)


def served(setup: str, profile: Profile, profiled: Pace, options: argparse.Namespace) -> list[Served]:
    """All loads of one set-up, each served `--repeats` times by one cluster. `profiled`: the pace of the profile."""
    values, load = values_of(setup, options), load_of(options)
    able = capacity(profile, load_config(values), load)
    rates = [share * able for share in options.shares]
    print(f"{setup}: can do {able:.2f} requests/s by the simulation", flush=True)

    def requests(rate: float, variant: int) -> list[Arrival]:
        return list(limited(load.arrivals(rate, variant), None, max(options.seconds, FEWEST / rate)))

    runs: dict[float, list[tuple[Asked, ...]]] = {rate: [] for rate in rates}
    slower: dict[float, list[Pace]] = {rate: [] for rate in rates}

    async def ask(up: Up) -> None:
        server = await _server(up, options.seed)
        await _warm(server)
        before = pace()
        for repeat in range(options.repeats):
            for number, rate in enumerate(rates):
                variant = 1 + number + len(rates) * repeat  # other prompts each time: a worker keeps the prefixes of those it has read
                run = await measure(server, requests(rate, variant), asyncio.Event(), lambda _: None)
                runs[rate].append(tuple(map(Asked.of, sorted(run.answers, key=lambda each: each.arrival.at))))
                after = pace()
                slower[rate].append(Pace.between(before, after) / profiled)
                before = after
                said = f"{len(run.answers)} requests, {run.errors} errors; the machine takes {slower[rate][-1]} times as long"
                print(f"{setup} {rate:.2f}/s: {said}", flush=True)

    serve(values, ask)
    return [Served(setup, rate, tuple(found), tuple(slower[rate])) for rate, found in runs.items()]


def compared(load: Served, profiles: Sequence[Profile], options: argparse.Namespace) -> Comparison:
    """The same requests at the same times, simulated, each run with a profile of its own."""
    config, slo = load_config(values_of(load.setup, options)), parse_slo(options.slo)

    def predicted(factor: float = 1.0) -> Figures:
        pairs = zip(profiles, load.runs, strict=True)
        return Figures.median([simulated(profile, config, _arrivals(run, factor), slo) for profile, run in pairs])

    runs = [measured(run, slo) for run in load.runs]
    around = predicted(1 - RATE).attainment, predicted(1 + RATE).attainment
    return Comparison(load.setup, load.rate, len(load.runs[0]), predicted(), Figures.median(runs), runs, around)


def _arrivals(run: Sequence[Asked], factor: float) -> list[Arrival]:
    """As many times as fast."""
    return [Arrival(number, each.at / factor, each.prompt_tokens, each.output_tokens) for number, each in enumerate(run)]


def write_served(file: Path, loads: Sequence[Served]) -> None:
    rows = [
        {
            "setup": load.setup, "rate": load.rate, "runs": [[astuple(each) for each in run] for run in load.runs],
            "slower": [astuple(each) for each in load.slower],
        }
        for load in loads
    ]  # fmt: skip
    file.write_text(json.dumps({"columns": Asked.__slots__, "loads": rows}) + "\n")


def read_served(file: Path) -> list[Served]:
    """`SystemExit` says what is wrong with the file."""
    try:
        rows = json.loads(file.read_text())["loads"]
        return [
            Served(
                row["setup"], row["rate"], tuple(tuple(Asked(*each) for each in run) for run in row["runs"]),
                tuple(Pace(*each) for each in row.get("slower", ())),
            )
            for row in rows
        ]  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"--measured {file} is not what --answers writes: {error}.") from None


async def _server(up: Up, seed: int) -> Server:
    return await find_server(
        f"http://{up.http}", model=None, api_key=None, vocabulary=up.card.vocab_size, seed=seed, timeout_s=TIMEOUT_S, as_text=False
    )


async def _warm(server: Server) -> None:
    for number in range(WARM_UP):
        arrival = Arrival(-2 - number, 0.0, 256, 16)
        await server.ask(arrival, server.prepare(arrival), 0.0)


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("attainment", "met", lambda value: f"{100 * value:.0f} %"),
    ("goodput", "goodput /s", lambda value: f"{value:.2f}"),
    *((name, f"{name[:4].upper()} {name[5:]} ms", lambda value: f"{1000 * value:.0f}") for name in Figures.__slots__[2:]),
)


def table(found: Sequence[Comparison]) -> str:
    """Measured → simulated; `!`: beyond what is promised. Below it how many are."""
    lines = [f"{'':10}{'/s':>6}{'n':>5}" + "".join(f"{title:>17}" for _, title, _ in COLUMNS)]
    for each in found:
        beyond = {name for name, _, _ in each._beyond()}
        cells = [
            f"{write(getattr(each.measured, name))} → {write(getattr(each.simulated, name))}{'!' if name in beyond else ' '}"
            for name, _, write in COLUMNS
        ]
        lines.append(f"{each.setup:10}{each.rate:6.2f}{each.requests:5}" + "".join(f"{cell:>17}" for cell in cells))
    misses = [miss for each in found for miss in each.misses()]
    return "\n".join([*lines, "", f"{len(misses)} of {6 * len(found)} figures are beyond what is promised", *misses])


def plot(file: Path, found: Sequence[Comparison], slo: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = (
        (("attainment",), f"met {slo}", 1.0), (("goodput",), "goodput (requests/s)", 1.0),
        (("ttft_p50", "ttft_p90"), "TTFT p50, p90 (ms)", 1000.0), (("tpot_p50", "tpot_p90"), "TPOT p50, p90 (ms)", 1000.0),
    )  # fmt: skip
    for axes, (names, title, scale) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for setup, colour in (("apart", "tab:blue"), ("colocated", "tab:orange")):
            rows = [each for each in found if each.setup == setup]
            rates = [each.rate for each in rows]
            for number, name in enumerate(names):
                label = setup if number == 0 else None
                axes.plot(
                    rates, [scale * getattr(each.simulated, name) for each in rows], color=colour, linestyle="-:"[number], label=label
                )
                axes.scatter(rates, [scale * getattr(each.measured, name) for each in rows], color=colour, marker="ox"[number])
        axes.set(xlabel="requests/s", title=title)
        if scale != 1.0:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("lines: simulated, points: measured")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diptych.benchmarks.ourselves", description="How right is the simulator about this machine?"
    )
    parser.add_argument("--profile", type=Path, help="of the model on this machine; by default it is made now, which takes some minutes")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each load")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each load, each after all others; their medians count")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=SHARES, help="rates, as shares of what a set-up can do by the simulation"
    )
    parser.add_argument("--setup", choices=("apart", "colocated"), help="by default both")
    parser.add_argument("--input", default="64-448", help="prompt tokens, a range")
    parser.add_argument("--output", default="16-96", help="output tokens, a range")
    parser.add_argument("--slo", default="ttft=1s,tpot=50ms")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="write each request that was served, for --measured")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="compare with these, served before, in place of serving")
    parser.add_argument("--keep", default="ourselves", help="name of the file in benchmarks/results")
    parser.add_argument("--plot", type=Path, default=RESULTS / "ourselves.png")
    options = parser.parse_args()
    where = surroundings()
    print(describe(where))
    before = pace()
    profile = read_profile(options.profile) if options.profile else _profiled(options)
    profiled = pace() if options.profile else Pace.between(before, pace())
    setups = (options.setup,) if options.setup else ("apart", "colocated")
    if options.measured:
        loads = [load for load in read_served(options.measured) if load.setup in setups]
    else:
        loads = [each for setup in setups for each in served(setup, profile, profiled, options)]
    if options.answers:
        write_served(options.answers, loads)
    found = [compared(load, [profile] * len(load.runs), options) for load in loads]
    print(f"\nmeasured → simulated, {options.slo}\n{table(found)}\n")
    at_pace = [compared(load, [paced(profile, each) for each in load.slower], options) for load in loads if load.slower]
    if at_pace:
        print(f"the same, each load simulated at the pace that it met\n{table(at_pace)}\n")
    plot(options.plot, found, options.slo)
    used = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    results: dict[str, Any] = {"profile": profile.model_dump(mode="json")}
    for name, those in (("loads", found), ("at_pace", at_pace)):
        results[name] = [{**asdict(each), "misses": each.misses()} for each in those]
    results["slower"] = [[astuple(each) for each in load.slower] for load in loads]
    print(f"kept in {keep(options.keep, where, used, results)} and {options.plot}")


def _profiled(options: argparse.Namespace) -> Profile:
    with tempfile.TemporaryDirectory(prefix="diptych-profile-") as scratch:
        model_dir = prepare_here(options.model or "demo", options.dtype, None, None, None)
        return profile_here(model_dir, gpus=(), tps=(), threads=None, repeats=5, clusters=True, out=Path(scratch, "P.json"))


if __name__ == "__main__":
    main()

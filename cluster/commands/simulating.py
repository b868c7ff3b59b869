"""What `diptych simulate` does: files read, progress shown, what came of it written as it comes."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...core.config import ClusterConfig
from ...core.errors import ConfigError
from ...core.quantization import precision
from ...engine.location import source_name
from ..load.choice import Load
from ..load.mix import parse_mix
from ..load.slo import Slo, parse_slo
from ..load.traces import read_arrivals
from ..load.workload import Arrival, limited, read_pairs
from ..planner.life import Life
from ..planner.policies import Policies, workers_of
from ..planner.profile import Link, Profile
from ..planner.site import together
from ..planner.world import World
from ..supervising.config_file import read_config
from .devices import link_among, read_profiles, used_by
from .requests_file import requests_file

DRAWN_REQUESTS = 1000
"""How many are simulated of a load without an end."""
_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Requests:
    """`total`: None where only the file's end tells. `begin` opens what it comes from anew."""

    begin: Callable[[], Iterator[Arrival]]
    total: int | None
    name: str


def load_of(
    workload: Path | None, lengths: Path | None, *, rate: float | None, burstiness: float, requests: int | None, seed: int
) -> Requests:
    """`ConfigError` names what is lacking or one too many."""
    if (workload is None) == (lengths is None):
        raise ConfigError("Give --workload, or --lengths and --rate.", field="workload")
    if lengths is not None:
        if rate is None:
            raise ConfigError("--lengths says how long requests are; --rate must say how many come per second.", field="rate")
        drawn = Load(lengths=tuple(read_pairs(_text(lengths), lengths.name)), burstiness=burstiness, seed=seed)
        drawn.check()
        count = requests or DRAWN_REQUESTS
        return Requests(lambda: limited(drawn.arrivals(rate), count, None), count, f"{lengths.name} at {rate:g}/s")
    assert workload is not None
    if workload.suffix == ".json":
        mix = parse_mix(_text(workload), workload.name)
        count = requests or DRAWN_REQUESTS
        return Requests(lambda: limited(mix.arrivals(rate or mix.rate, seed), count, None), count, workload.name)
    if rate is not None:
        raise ConfigError(f"{workload.name} says when its requests come: leave --rate out.", field="rate")
    _check(workload)
    return Requests(lambda: limited(lines_of(workload, told=False), requests, None), requests, workload.name)


def _check(workload: Path) -> None:
    """All of it, before anything is simulated or written."""
    for _ in lines_of(workload):
        pass


def lines_of(workload: Path, *, told: bool = True) -> Iterator[Arrival]:
    """The requests of a trace file, as they are read. `told`: say at its end how many rows were left out because they have no answer."""
    failed: list[int] = []
    try:
        with workload.open(encoding="utf-8") as file:
            yield from read_arrivals(file, workload.name, failed.append)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{workload} cannot be read: {error}.", field="workload") from None
    if failed and told:
        rows = "row has" if len(failed) == 1 else "rows have"
        _err.print(f"{workload.name}: {len(failed)} {rows} no answer, the first in line {failed[0]}: left out", markup=False)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.", field="workload") from None


@dataclass(frozen=True, slots=True)
class Simulating:
    """One call of the command."""

    profiles: tuple[Profile, ...]
    config: ClusterConfig
    slo: Slo
    link: Link

    @classmethod
    def begin(cls, profiles: Sequence[Path], plan: Path, slo: str, link: str | None) -> Simulating:
        """Read all that is named; `ConfigError` for what is wrong, or does not fit together."""
        known, config = read_profiles(profiles), read_config(plan, {})
        check_model(known[0], config)
        used = used_by(config, known)
        return cls(used, config, parse_slo(slo), link_among(used, link))

    def run(self, requests: Requests, out: Path | None) -> World:
        refusals: dict[str, tuple[int, str]] = {}
        with requests_file(out) as file, _bar(requests.total) as step:

            def ended(life: Life) -> None:
                file.add(life, world.meets(life))
                if life.refused is not None:
                    count_refusal(refusals, life.refused)
                step()

            hardware = workers_of(self.config, self.profiles[0], self.profiles[1:])
            world = World(together(self.profiles), hardware, Policies.of(self.config), link=self.link, slo=self.slo, on_end=ended)
            with few_collections():
                world.run(requests.begin())
            summary = world.as_json() | {
                "refusals": {example: count for count, example in refusals.values()},
                "profile": "; ".join(profile.source for profile in self.profiles),
                "estimate": any(profile.estimate for profile in self.profiles),
                "workload": requests.name,
            }
            file.end(summary)
        show(summary)
        for profile in self.profiles:
            if profile.estimate:
                _out.print(
                    f"The times of {profile.device.name} are an estimate ({profile.source}); `diptych profile` measures them.", markup=False
                )
        return world


def check_model(profile: Profile, config: ClusterConfig) -> None:
    """`ConfigError` if the plan serves another model, or another type, than the profile is about."""
    known, name, source = profile.model, config.model.name, config.model.source
    dtype = precision(config.model.dtype, config.model.quantization)
    if name is not None and name != known.name:
        raise ConfigError(f"The profile is of {known.name}, and the plan serves {name}.", field="model.name")
    if name is None and source is not None and not {source, source_name(source)} & {known.name, known.source}:
        raise ConfigError(
            f"model.source: the profile is of {known.name}, and the plan serves {source}. If that is the same model say so, with "
            f"model.name: {known.name}.",
            field="model.source",
        )
    if dtype != known.dtype:
        said = {"dtype", "quantization"} & config.model.model_fields_set
        unsaid = "" if said else f", which is what it serves unless model.dtype says {known.stored[0]}"
        raise ConfigError(f"The profile is of {known.dtype}, and the plan serves {dtype}{unsaid}.", field="model.dtype")
    if config.model.held_as is not None:
        raise ConfigError(
            f"model.kv_dtype: the profile is of KV in {known.stored[0]}, and the plan holds it in {config.model.kv_dtype}, whose memory "
            "and times are not known.",
            field="model.kv_dtype",
        )


def count_refusal(refusals: dict[str, tuple[int, str]], why: str) -> None:
    """Reasons that differ in numbers alone are one: how many there were, and the first."""
    kind = re.sub(r"\d[\d,.]*", "#", why)
    count, example = refusals.get(kind, (0, why))
    refusals[kind] = count + 1, example


def write_text(out: Path, text: str) -> None:
    """Write a file; `ConfigError` if it cannot be."""
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}.", field="out") from None


@contextmanager
def _bar(total: int | None) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TextColumn("requests"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task, ended = progress.add_task("", total=total), 0

        def step() -> None:
            nonlocal ended
            ended += 1
            if ended % 50 == 0:
                progress.update(task, completed=ended)

        yield step


@contextmanager
def few_collections() -> Iterator[None]:
    """Requests are freed by their counts; searching for circles among them took a fifth of the time."""
    thresholds = gc.get_threshold()
    collect_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def collect_rarely() -> None:
    """From now on in this process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


def show(summary: dict[str, Any]) -> None:
    """For a person."""
    table = Table("ms", "mean", "p50", "p90", "p99", "max", box=None, pad_edge=False, header_style="bold")
    for name, figures in summary["times"].items():
        table.add_row(name, *(f"{1000 * figures[key]:,.1f}" for key in ("mean", "p50", "p90", "p99", "max")))
    _out.print(table)
    found = summary["attainment"]
    refused = f", {summary['refused']} refused" if summary["refused"] else ""
    _out.print(f"{summary['requests']} requests in {summary['seconds']:.1f} s of simulated time{refused}", markup=False)
    for why, count in summary["refusals"].items():
        _out.print(f"  refused, {count} such: {why}", markup=False)
    _out.print(
        f"{found['slo']} met jointly by {found['met']}: {found['share']:.1%}; goodput {summary['goodput']:.3g} requests/s", markup=False
    )
    busy = ", ".join(f"{name} {100 * course['utilisation']:.0f} %" for name, course in list(summary["workers"].items())[:16])
    _out.print(f"busy: {busy}{' …' if len(summary['workers']) > 16 else ''}", markup=False)
    if summary["across"]:
        left = ", ".join(f"{count} ({why})" for why, count in summary["across"].items())
        _out.print(f"requests whose KV left its pair: {left}", markup=False)

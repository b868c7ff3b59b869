"""A profile for a person: what was fitted and how well, and what every other figure rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from rich.console import Console
from rich.table import Table

from ...core.fleet import Phase
from ..planner.latency import DecodeTimes, StepTimes
from ..planner.profile import Basis, Profile, Residuals
from .reckoning import Seen, prompt_seconds

POOR = 0.25
"""Residuals of an idle machine are below this share."""
_out = Console(highlight=False, soft_wrap=True)


class Fitted(Protocol):
    @property
    def times(self) -> StepTimes: ...
    @property
    def prefill(self) -> Residuals: ...
    @property
    def decode(self) -> Residuals: ...


class Crossing(Protocol):
    @property
    def residuals(self) -> Residuals: ...


def show(made: Profile, fitted: Mapping[int, Fitted], crossings: Mapping[str, Crossing], seen: Seen | None) -> None:
    """Tables on stdout, and a warning if the fit is poor."""
    _show_steps(fitted)
    _show_rest(made, crossings)
    if seen is not None:
        for line in _checks(made, seen):
            _out.print(line, markup=False)
    worst = max(found.worst for each in fitted.values() for found in (each.prefill, each.decode))
    if worst > POOR:
        _out.print(
            f"A fit that is off by {worst:.0%} somewhere is poor: was the machine busy with something else? Measure again when it is idle.",
            markup=False,
        )


def _show_steps(fitted: Mapping[int, Fitted]) -> None:
    table = _table("fitted", "constant", "per token", "per pair | per sequence", "residuals")
    for cores, each in fitted.items():
        prefill, large = each.times.prefill, each.times.decode_large
        row = (f"{1e3 * prefill.constant:.2f} ms", f"{1e6 * prefill.token:.2f} µs", f"{1e9 * prefill.pair:.3f} ns", _fit(each.prefill))
        table.add_row(f"prefill, {_cores(cores)}", *row)
        table.add_row(f"decode, {_cores(cores)}", *_decode(each.times.decode), _fit(each.decode))
        if large is not None:
            table.add_row(f"  from {each.times.large_from} sequences on", *_decode(large), "")
    _out.print(table)


def _show_rest(made: Profile, crossings: Mapping[str, Crossing]) -> None:
    table = _table("", "", "")
    known, host = made.parallelisms[0], made.cores
    assert host is not None, "a host's profile knows its cores"

    def row(what: str, value: str, basis: Basis | str) -> None:
        table.add_row(what, value, str(basis))

    for cores, times in known.decode_by_cores.items():
        beside = f"{1e3 * times.both:.2f} ms more, and {1e3 * (times.both_row or 0.0):.2f} ms for each sequence"
        row(f"a step with a prompt's chunk on {_cores(cores)}", beside, made.basis["step"])
        added = f"{1e3 * times.step:.2f} ms and {1e3 * times.step_row:.2f} ms for each sequence"
        row(f"serving adds to a step on {_cores(cores)}", added, made.basis["step"])
    row("a prefill step beside decode steps", _slower(host.prefill_beside), made.basis["cores.prefill_beside"])
    row("a decode step beside prefill steps", _slower(host.decode_beside), made.basis["cores.decode_beside"])
    row("a request outside of steps", f"{1e3 * made.overheads.request:.2f} ms", made.basis["overheads.request"])
    row("a message between two workers", f"{1e3 * made.overheads.message:.3f} ms", made.basis["overheads.message"])
    for name, link in made.links.items():
        value = f"{link.bytes_per_s / 1e9:.2f} GB/s after {1e3 * link.latency:.3f} ms"
        row(f"KV over {name}", value, f"{made.basis['links']}; {_fit(crossings[name].residuals)}")
    row("memory for KV", f"{known.kv_tokens[1]:,} tokens", made.basis["kv_tokens"])
    _out.print(table)


def _checks(made: Profile, seen: Seen) -> Iterator[str]:
    """Prompts alone, by what is simulated and as they were measured; and how the machine was meanwhile."""
    host = made.cores
    assert host is not None, "a host's profile knows its cores"
    both = (
        ("apart", seen.apart.prompts, Phase.PREFILL, None),
        ("at one worker for both", seen.together.prompts, Phase.DECODE, seen.together.chunk),
    )
    for what, prompts, phase, chunk in both:
        times = made.parallelisms[0].on_cores(host.count, phase)
        found = [(each, made.overheads.request + prompt_seconds(times, each.tokens, chunk)) for each in prompts]
        said = [f"{each.tokens} tokens {1e3 * reckoned:.0f} ms (measured {1e3 * each.ttft:.0f})" for each, reckoned in found]
        yield f"A check, TTFT of a prompt alone, {what}: {', '.join(said)}."
    for what, moment in (("apart", seen.while_apart), ("together", seen.while_together)):
        yield (
            f"While the cluster {what} ran the engine alone took {moment.prefill:.2f} times as long for prompts and {moment.decode:.2f} "
            "for answers as at first; that is taken out."
        )


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False, header_style="bold", show_header=any(columns))


def _decode(times: DecodeTimes) -> tuple[str, str, str]:
    return f"{1e3 * times.constant:.2f} ms", f"{1e6 * times.context:.3f} µs", f"{1e6 * times.row:.1f} µs"


def _slower(beside: Mapping[int, float]) -> str:
    factors, rows = (" and ".join(each) for each in zip(*((f"{beside[rows]:.2f}", str(rows)) for rows in sorted(beside)), strict=True))
    return f"{factors} times as long with {rows} answers"


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def _fit(residuals: Residuals) -> str:
    return f"mean {residuals.mean:.1%}, worst {residuals.worst:.1%}"

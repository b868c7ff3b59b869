"""A profile for a person: what was fitted and how well, and what every other figure rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ..planner.latency import DecodeTimes, StepTimes
from ..planner.profile import Basis, Profile, Residuals
from .making import Crossing, Fitted
from .reckoning import Moment, Prompt, prompt_seconds

POOR = 0.25
"""Residuals of an idle machine are below this share."""
_out = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Check:
    """Prompts that a small cluster answered one by one in steps of `chunk` tokens (None: in one), the times that it has in the profile, and
    how the machine was meanwhile."""

    what: str
    prompts: tuple[Prompt, ...]
    times: StepTimes
    chunk: int | None
    moment: Moment


def show(made: Profile, fitted: Sequence[Fitted], crossings: Mapping[str, Crossing], checks: Sequence[Check]) -> None:
    """Tables on stdout, and a warning if the fit is poor."""
    _show_steps(fitted)
    _show_rest(made, crossings)
    for line in _lines(made, checks):
        _out.print(line, markup=False)
    worst = max(found.worst for each in fitted for found in (each.prefill, each.decode))
    if worst > POOR:
        _out.print(
            f"A fit that is off by {worst:.0%} somewhere is poor: was the machine busy with something else? Measure again when it is idle.",
            markup=False,
        )


def _show_steps(fitted: Sequence[Fitted]) -> None:
    table = _table("fitted", "constant", "per token", "per pair | per sequence", "residuals")
    for each in fitted:
        prefill, large = each.times.prefill, each.times.decode_large
        row = (f"{1e3 * prefill.constant:.2f} ms", f"{1e6 * prefill.token:.2f} µs", f"{1e9 * prefill.pair:.3f} ns", _fit(each.prefill))
        table.add_row(f"prefill, {each.place}", *row)
        table.add_row(f"decode, {each.place}", *_decode(each.times.decode), _fit(each.decode))
        if large is not None:
            table.add_row(f"  from {each.times.large_from} sequences on", *_decode(large), "")
    _out.print(table)


def _show_rest(made: Profile, crossings: Mapping[str, Crossing]) -> None:
    table = _table("", "", "")

    def row(what: str, value: str, basis: Basis | str) -> None:
        table.add_row(what, value, str(basis))

    for where, times in _added_to(made):
        beside = f"{1e3 * times.both:.2f} ms more, and {1e3 * (times.both_row or 0.0):.2f} ms for each sequence"
        row(f"a step with a prompt's chunk on {where}", beside, made.basis["step"])
        added = f"{1e3 * times.step:.2f} ms and {1e3 * times.step_row:.2f} ms for each sequence"
        row(f"serving adds to a step on {where}", added, made.basis["step"])
    if made.cores is not None and made.cores.prefill_beside:
        row("a prefill step beside decode steps", _slower(made.cores.prefill_beside), made.basis["cores.prefill_beside"])
        row("a decode step beside prefill steps", _slower(made.cores.decode_beside), made.basis["cores.decode_beside"])
    row("a request outside of steps", f"{1e3 * made.overheads.request:.2f} ms", made.basis["overheads.request"])
    row("a message between two workers", f"{1e3 * made.overheads.message:.3f} ms", made.basis["overheads.message"])
    for name, link in made.links.items():
        value = f"{link.bytes_per_s / 1e9:.2f} GB/s after {1e3 * link.latency:.3f} ms"
        row(f"KV over {name}", value, f"{made.basis['links']}; {_fit(crossings[name].residuals)}")
    for known in made.parallelisms:
        row(f"memory for KV, tp {known.tp}", f"{known.kv_tokens[1]:,} tokens", made.basis["kv_tokens"])
    _out.print(table)


def _added_to(made: Profile) -> Iterator[tuple[str, StepTimes]]:
    for known in made.parallelisms:
        for cores, times in known.decode_by_cores.items():
            yield f"{cores} core{'s' * (cores > 1)}", times
        if not known.decode_by_cores:
            yield f"tp {known.tp}", known.times


def _lines(made: Profile, checks: Sequence[Check]) -> Iterator[str]:
    """Prompts alone, by what is simulated and as they were measured; and how the machine was meanwhile."""
    for each in checks:
        found = [(of, made.overheads.request + prompt_seconds(each.times, of.tokens, each.chunk)) for of in each.prompts]
        said = [f"{of.tokens} tokens {1e3 * reckoned:.0f} ms (measured {1e3 * of.ttft:.0f})" for of, reckoned in found]
        yield f"A check, TTFT of a prompt alone, {each.what}: {', '.join(said)}."
    for each in checks:
        yield (
            f"While the cluster {each.what} ran the engine alone took {each.moment.prefill:.2f} times as long for prompts and "
            f"{each.moment.decode:.2f} for answers as at first; that is taken out."
        )


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False, header_style="bold", show_header=any(columns))


def _decode(times: DecodeTimes) -> tuple[str, str, str]:
    return f"{1e3 * times.constant:.2f} ms", f"{1e6 * times.context:.3f} µs", f"{1e6 * times.row:.1f} µs"


def _slower(beside: Mapping[int, float]) -> str:
    factors, rows = (" and ".join(each) for each in zip(*((f"{beside[rows]:.2f}", str(rows)) for rows in sorted(beside)), strict=True))
    return f"{factors} times as long with {rows} answers"


def _fit(residuals: Residuals) -> str:
    return f"mean {residuals.mean:.1%}, worst {residuals.worst:.1%}"

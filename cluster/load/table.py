"""The report for a person."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from .answer import Counting
from .goodput import Goodput, Probe
from .report import Report

_NAMES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL, from token 2 on",
    "handover_gap": "gap, token 1 to 2",
    "e2e": "E2E",
    "connect": "connecting",
}
LATE_S = 0.01
"""A client that sends later than this is part of what it measures."""


def show_report(out: Console, report: Report) -> None:
    """The times, then what is to be known of them, a line each."""
    table = Table("ms", *("p50", "p90", "p99", "max"), box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, figures in report.times.items():
        values = (figures.p50, figures.p90, figures.p99, figures.max)
        table.add_row(_NAMES[name], *(f"{1000 * value:,.1f}" for value in values))
    if report.times:
        out.print(table)
    for line in _lines(report):
        out.print(line, markup=False)


def _lines(report: Report) -> Iterable[str]:
    cut = f", {report.unfinished} cut off" if report.unfinished else ""
    yield f"{report.requests} requests in {report.seconds:.1f} s, behind {report.warm_up} not counted (warm-up){cut}"
    if report.errors:
        yield "errors: " + ", ".join(f"{count} × {kind}" for kind, count in report.errors.items())
    yield (
        f"{report.requests_per_s:.2f} requests/s, {report.output_tokens_per_s:.1f} output tokens/s; a request has "
        f"{'?' if report.prompt_tokens is None else f'{report.prompt_tokens:.0f}'} prompt and {report.output_tokens:.0f} output tokens"
    )
    if report.itl_p99_over_p50:
        yield f"ITL p99 is {report.itl_p99_over_p50:.2f} times its p50"
    if report.handed_over is not None:
        yield f"KV was handed over for {report.handed_over} of {report.requests - sum(report.errors.values())}"
    if found := report.attainment:
        yield f"{found.slo} met jointly by {found.met} of {found.total}: {found.share:.1%} ({found.low:.1%} to {found.high:.1%} at 95 %)"
    yield from _on_events(report)
    yield from _on_client(report)


def _on_events(report: Report) -> Iterable[str]:
    shared = f"{report.shared_events} of {report.events} events carried more than one token"
    if Counting.EVENTS in report.counting:
        yield (
            f"the server does not say how many tokens an event carries: each with text counts as one, and "
            f"{report.uncounted_tokens} tokens have no time of their own, so ITL is between events"
        )
    elif report.events:
        yield f"{shared} (those tokens have one time)"


def _on_client(report: Report) -> Iterable[str]:
    cost = f", {report.cpu_us_per_event:.0f} µs per event" if report.cpu_us_per_event else ""
    yield f"client: {report.client.cpu_share:.1%} of a core{cost}" + (
        f"; requests sent late by p50 {1000 * report.lag.p50:.2f} ms, p99 {1000 * report.lag.p99:.2f} ms" if report.lag else ""
    )
    if report.lag and report.lag.p99 > LATE_S:
        yield f"the client was late by more than {1000 * LATE_S:.0f} ms: it, or its machine, is part of what was measured"
    if report.agreement:
        yield report.agreement.sentence()


def show_probe(out: Console, probe: Probe) -> None:
    late = f", sent late by p99 {1000 * probe.lag:.0f} ms" if probe.lag > LATE_S else ""
    out.print(
        f"{probe.rate:8.3f} requests/s: {probe.met} of {probe.total} met the SLO, {probe.share:.1%} "
        f"({probe.low:.1%} to {probe.high:.1%}): {probe.verdict}{late}",
        markup=False,
    )


def goodput_sentence(found: Goodput, target: float, confidence: float) -> str:
    """What was found, and how sure it is."""
    if found.rate is None and found.refuted is None:
        return "Goodput: nothing is known, no probe came to an end."
    each = f"at {confidence:.0%} for each rate"
    highest = "below the lowest rate tried" if found.rate is None else f"{found.rate:.3g} requests/s"
    proven = "no rate is shown to meet it" if found.proven is None else f"{found.proven:.3g} is shown to meet it"
    refuted = "none to miss it" if found.refuted is None else f"{found.refuted:.3g} to miss it"
    end = "" if found.complete else " The search was ended before it was through."
    return f"Goodput: {highest} with {target:.0%} meeting the SLO; {proven}, {refuted}, {each}.{end}"

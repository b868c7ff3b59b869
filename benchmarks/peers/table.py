"""The comparison for a person: the steady load with a row a server, then the goals with a row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from diptych.benchmarks.peers.goals import GOALS, PEER, Goal, Result
from diptych.benchmarks.peers.loads import SEARCH, STEADY

HEADINGS = (
    "", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "ITL p50", "ITL p99", "p99/p50", "gap p50", "gap p99", "tok/s", "SLO",
    "goodput", "shown",
)  # fmt: skip


def table(results: Mapping[str, Result], bound: Mapping[str, float]) -> str:
    """Times of the steady load in milliseconds, ITL from token 2 on, goodput in requests/s: what the search ended on, and what it showed
    to meet the SLO. Then each goal: what every server has, what the machine allows (`bound`, seconds), and who reaches it.

    What was skipped or failed has a line behind the tables.
    """
    lines = _aligned([HEADINGS, *(_row(name, result) for name, result in results.items() if STEADY in result)])
    lines += ["", *_goals(results, bound)]
    for name, result in results.items():
        lines += [f"{name}: {word}: {result[word]}" for word in ("skipped", "failed") if word in result]
        for load, report in result.items():
            if isinstance(report, Mapping) and report.get("errors"):
                lines.append(f"{name}: {load}: errors: {report['errors']}")
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def _row(name: str, result: Result) -> tuple[str, ...]:
    report = result[STEADY]
    times = report["times"]
    figures = [_ms(times, key, share) for key in ("ttft", "tpot", "itl") for share in ("p50", "p99")]
    ratio = report.get("itl_p99_over_p50")
    gaps = [_ms(times, "handover_gap", share) for share in ("p50", "p99")]
    attainment = report.get("attainment")
    return (
        name, *figures, "-" if ratio is None else f"{ratio:.2f}", *gaps, f"{report['output_tokens_per_s']:.1f}",
        f"{attainment['share']:.0%}" if attainment else "-", _rate(result, "rate"), _rate(result, "proven"),
    )  # fmt: skip


def _ms(times: Mapping[str, Any], name: str, share: str) -> str:
    return f"{1000 * times[name][share]:.1f}" if name in times else "-"


def _rate(result: Result, which: str) -> str:
    found = result.get(SEARCH, {}).get("goodput", {}).get(which)
    return "-" if found is None else f"{found:.2f}"


def _goals(results: Mapping[str, Result], bound: Mapping[str, float]) -> list[str]:
    measured = [name for name, result in results.items() if "start_s" in result]
    peer = results.get(PEER, {})
    rows = [("goal", *measured, "bound", "wanted", "reached by")]
    for goal in GOALS:
        values = [_shown(goal, goal.value(results[name])) for name in measured]
        least = _shown(goal, 1000 * bound[goal.bound]) if goal.bound else "-"
        reached = ", ".join(name for name in measured if name.startswith("diptych") and goal.reached(results[name], peer))
        rows.append((goal.name, *values, least, goal.wanted, reached or "-"))
    return _aligned(rows)


def _shown(goal: Goal, value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} {goal.unit}".strip()

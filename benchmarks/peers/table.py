"""The comparison for a person: one row a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADINGS = (
    "", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "ITL p50", "ITL p99", "p99/p50", "gap p50", "gap p99", "tok/s", "SLO",
    "goodput", "shown",
)  # fmt: skip


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Times in milliseconds, ITL from token 2 on, goodput in requests/s: what the search ended on, and what it showed to meet the SLO.

    What was skipped or failed has a line behind the table.
    """
    measured = [(name, result) for name, result in results.items() if "times" in result]
    rows = [HEADINGS, *(_row(name, result) for name, result in measured)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    for name, result in results.items():
        for word in ("skipped", "failed"):
            if word in result:
                lines.append(f"{name}: {word}: {result[word]}")
        if errors := result.get("errors"):
            lines.append(f"{name}: errors: {errors}")
    return "\n".join(lines)


def _row(name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    times = result["times"]
    figures = [_ms(times, key, share) for key in ("ttft", "tpot", "itl") for share in ("p50", "p99")]
    ratio = result.get("itl_p99_over_p50")
    gaps = [_ms(times, "handover_gap", share) for share in ("p50", "p99")]
    attainment = result.get("attainment")
    return (
        name, *figures, "-" if ratio is None else f"{ratio:.2f}", *gaps, f"{result['output_tokens_per_s']:.1f}",
        f"{attainment['share']:.0%}" if attainment else "-", _rate(result, "rate"), _rate(result, "proven"),
    )  # fmt: skip


def _ms(times: Mapping[str, Any], name: str, share: str) -> str:
    return f"{1000 * times[name][share]:.1f}" if name in times else "-"


def _rate(result: Mapping[str, Any], which: str) -> str:
    found = (result.get("goodput") or {}).get(which)
    return "-" if found is None else f"{found:.2f}"

"""Where a step's time goes, for a person: a few tables for each process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console

from .shares import Beside, Shares, Steps
from .trace import clocks


def show_shares(out: Console, found: Sequence[Shares]) -> None:
    """Times are milliseconds."""
    for shares in found:
        _show(out, shares)
    out.print(f"Times are ms. The trace's clocks: {clocks(shares.process for shares in found)}.", markup=False)


def _show(out: Console, shares: Shares) -> None:
    recorded = shares.process.recorded
    lost = f"; of more the last are kept, {recorded.lost} are lost" if recorded.lost else ""
    seconds = (recorded.ended - recorded.began) / 1e9
    out.print(f"\n[bold]{shares.process.name}[/]: {shares.count} {shares.per}s in {seconds:.1f} s, {len(recorded.spans)} spans{lost}")
    if shares.steps is not None:
        _print(out, ("of a step", "count", "mean", "p50", "p99", "max", "share", "on a core"), _steps(shares.steps))
        out.print(f"outside the model: {shares.steps.outside:.1%} of a step")
    if shares.beside:
        heads = ("beside that, by thread", "", "count", "mean", "p50", "p99", f"per {shares.per}", "on a core")
        _print(out, heads, (_beside(line) for line in shares.beside), texts=2)
    if shares.cores:
        rows = ((core.thread, *_ms(core.ran, core.ready)) for core in shares.cores)
        _print(out, (f"cores, per {shares.per}", "ran", "waited for one"), rows)


def _beside(line: Beside) -> tuple[str, ...]:
    each = line.each
    return line.thread, line.name, str(line.count), *_ms(each.mean, each.p50, each.p99, line.per_step, line.on_core)


def _steps(steps: Steps) -> list[tuple[str, ...]]:
    whole = steps.each.mean
    rows = [
        (
            line.name,
            str(line.count),
            *_ms(line.each.mean, line.each.p50, line.each.p99, line.each.max),
            f"{line.each.mean / whole:.1%}",
            *_ms(line.on_core),
        )
        for line in steps.lines
    ]
    on_core = sum(line.on_core for line in steps.lines)
    each = steps.each
    rows.append(("a step", str(each.count), *_ms(each.mean, each.p50, each.p99, each.max), "100.0%", *_ms(on_core)))
    return rows


def _ms(*seconds: float) -> tuple[str, ...]:
    return tuple(f"{1e3 * each:,.3f}" for each in seconds)


def _print(out: Console, heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> None:
    """The first `texts` columns are words, the others numbers. Not a rich table: that would cut columns where the terminal is narrow."""
    cells = [tuple(heads), *map(tuple, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    for number, row in enumerate(cells):
        padded = (
            cell.ljust(width) if column < texts else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        out.print("  ".join(padded).rstrip(), style="" if number else "bold", markup=False, soft_wrap=True)

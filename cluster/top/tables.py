"""How `diptych top` draws a picture of the cluster."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .picture import Latency, Picture, TransferRow, WorkerRow

BAR = 8
"""Characters of a pool's bar."""
FULL, NEARLY = 0.95, 0.8
TARGET = 0.9
"""The share of requests that should be within the SLO, as for goodput."""


def draw(seen: Picture, server: str) -> RenderableType:
    span = "since the router started" if seen.seconds is None else f"the last {seen.seconds:.0f} s"
    head = Text.assemble(("Diptych ", "bold"), (seen.model, "bold cyan"), f" at {server}   {span}")
    parts: list[RenderableType] = [head, _requests(seen), Text(), _latencies(seen), Text(), _workers(seen.workers)]
    if seen.transfers:
        parts += [Text(), _transfers(seen.transfers)]
    return Group(*parts)


def _requests(seen: Picture) -> RenderableType:
    good = seen.ended.get("stop", 0) + seen.ended.get("length", 0)
    bad = {name: count for name, count in seen.ended.items() if name not in ("stop", "length")}
    lines = [
        f"requests  {seen.running} running, {good} answered" + (f", {_counts(bad)}" if bad else "") + _per_s(seen.requests_per_s, ""),
        f"tokens    prompt{_per_s(seen.prompt_tokens_per_s, '–')}   output{_per_s(seen.output_tokens_per_s, '–')}",
        f"attempts  {_counts(seen.paths) or 'none'}   retries {seen.retries}   held {seen.held}"
        + (f"   refused {_counts(seen.refusals)}" if seen.refusals else ""),
    ]
    return Text("\n".join(lines))


def _latencies(seen: Picture) -> RenderableType:
    table = _table("latency", "p50", "p90", "p99", "SLO", "within")
    named = (("TTFT", seen.ttft), ("TPOT", seen.tpot), ("queue", seen.queue), ("exposed hand-over", seen.exposed))
    for name, latency in named:
        table.add_row(name, *(_seconds(value) for value in (latency.p50, latency.p90, latency.p99)), *_against(latency))
    return table


def _against(latency: Latency) -> tuple[str | Text, str | Text]:
    if latency.slo is None:
        return "", ""
    if latency.met is None:
        return _seconds(latency.slo), "–"
    return _seconds(latency.slo), Text(f"{latency.met:.0%}", style="green" if latency.met >= TARGET else "bold red")


def _workers(workers: Iterable[WorkerRow]) -> RenderableType:
    table = _table("worker", "", "run", "wait", "KV pool", "cached", "leases", "ungranted", "steps/s", "read/s", "recomputed")
    for worker in workers:
        total = sum(worker.blocks.values())
        table.add_row(
            worker.name,
            Text("up", style="green") if worker.up else Text("gone", style="bold red"),
            str(worker.running),
            str(worker.waiting),
            _bar(worker.kv_usage),
            f"{worker.blocks.get('cached', 0) / total:.0%}" if total else "–",
            str(worker.leases),
            str(worker.grants_waiting),
            _rate(worker.steps_per_s),
            _rate(worker.tokens_per_s),
            f"{worker.recomputed:,}" + (f" ({worker.preemptions} preempted)" if worker.preemptions else ""),
        )
    return table


def _transfers(transfers: Iterable[TransferRow]) -> RenderableType:
    table = _table("KV over", "transfers", "moved", "a second", "p50", "p90")
    for row in transfers:
        speed = "–" if row.bytes_per_s is None else _bytes(row.bytes_per_s)
        table.add_row(row.transport, f"{row.count:,}", _bytes(row.bytes), speed, _seconds(row.p50), _seconds(row.p90))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number > 1 and column != "KV pool" else "left", no_wrap=True)
    return table


def _bar(share: float) -> Text:
    style = "red" if share >= FULL else "yellow" if share >= NEARLY else "green"
    filled = round(min(1.0, share) * BAR)
    return Text.assemble(("█" * filled, style), ("░" * (BAR - filled), "dim"), f" {share:4.0%}")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _per_s(rate: float | None, otherwise: str) -> str:
    return f" {otherwise}".rstrip() if rate is None else f" ({_rate(rate)}/s)"


def _rate(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"

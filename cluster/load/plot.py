"""The report as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from .answer import Answer
from .goodput import Probe, Verdict
from .slo import Slo

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {Verdict.MET: "tab:green", Verdict.MISSED: "tab:red", Verdict.OPEN: "tab:grey"}


def plot_run(file: Path, answers: Sequence[Answer], warm_up: int, slo: Slo | None, title: str) -> None:
    """Distributions of TTFT, TPOT and ITL, and TTFT over the run. Only requests without an error."""
    from matplotlib.figure import Figure

    good = [answer for answer in answers if answer.error is None and answer.arrival.number >= warm_up]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    ((ttft, tpot), (itl, course)) = figure.subplots(2, 2)
    _distribution(ttft, "TTFT", [answer.ttft for answer in good if answer.ttft is not None], slo.ttft if slo else None)
    _distribution(tpot, "TPOT", [answer.tpot for answer in good if answer.tpot is not None], slo.tpot if slo else None)
    _distribution(itl, "ITL, from token 2 on", list(chain.from_iterable(answer.itl for answer in good)), None)
    ordered = sorted((answer.sent, answer.ttft) for answer in good if answer.ttft is not None)
    course.plot([sent for sent, _ in ordered], [1000 * value for _, value in ordered], ".", markersize=4)
    course.set(xlabel="sent at (s)", ylabel="TTFT (ms)", title="TTFT over the run", ylim=(0, None))
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def plot_search(file: Path, probes: Sequence[Probe], target: float, title: str) -> None:
    """Attainment over rate, with the interval of each probe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for probe in probes:
        below, above = max(0.0, probe.share - probe.low), max(0.0, probe.high - probe.share)
        axes.errorbar([probe.rate], [100 * probe.share], [[100 * below], [100 * above]], fmt="o", capsize=4, color=COLOURS[probe.verdict])
    axes.axhline(100 * target, linestyle="--", color="black", linewidth=1)
    axes.set(xlabel="requests/s", ylabel="requests that meet the SLO (%)", title=title, ylim=(0, 103))
    figure.savefig(file, dpi=120)


def _distribution(axes: Axes, name: str, values: list[float], limit: float | None) -> None:
    axes.ecdf([1000 * value for value in values] or [0.0])
    if limit is not None:
        axes.axvline(1000 * limit, linestyle="--", color="tab:red", linewidth=1)
    axes.set(xlabel=f"{name} (ms)", ylabel="share of all", title=name, xlim=(0, None))
    axes.grid(alpha=0.3)

"""Plans as a picture: what each costs and what it serves."""

from __future__ import annotations

from pathlib import Path

from ..planner.search import Outcome


def plot_front(file: Path, outcome: Outcome, title: str) -> None:
    """Every plan that was searched to its end, and the Pareto front through them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([each.cost_per_hour for each in outcome.scored], [each.rate for each in outcome.scored], ".", color="tab:grey")
    front = outcome.front()
    label = "Pareto front of the plans searched to their end"
    axes.plot([each.cost_per_hour for each in front], [each.rate for each in front], "o-", color="tab:blue", label=label)
    for each in front:
        axes.annotate(str(each.plan), (each.cost_per_hour, each.rate), fontsize=7, xytext=(4, -8), textcoords="offset points")
    axes.set(xlabel="cost per hour", ylabel="requests/s within the SLO", title=title, xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=120)

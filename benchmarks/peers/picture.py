"""The goals as a picture: what every server has, what the machine allows is in the table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diptych.benchmarks.peers.goals import GOALS, PEER, Result


def draw(file: Path, results: Mapping[str, Result], title: str) -> None:
    """A small chart a goal: a bar for each server, and a line where we want to be."""
    from matplotlib.figure import Figure

    measured = {name: result for name, result in results.items() if "start_s" in result}
    figure = Figure(figsize=(13, 6), layout="constrained")
    for axes, goal in zip(figure.subplots(2, -(-len(GOALS) // 2)).flat, GOALS, strict=False):
        values = {name: value for name, result in measured.items() if (value := goal.value(result)) is not None}
        bars = axes.bar(
            list(values), list(values.values()), color=["tab:blue" if name.startswith("diptych") else "tab:grey" for name in values]
        )
        axes.bar_label(bars, fmt="%.3g")
        peer = goal.value(results.get(PEER, {})) if goal.of_peer else 1.0
        if peer is not None:
            axes.axhline(goal.limit * peer, linestyle="--", color="tab:red", linewidth=1)
        axes.set(title=f"{goal.name} {f'({goal.unit})' if goal.unit else ''}: {goal.wanted}")
        axes.title.set_fontsize(9)
        axes.tick_params(axis="x", labelrotation=20, labelsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=110)

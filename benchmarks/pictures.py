"""What is kept of a benchmark as a picture beside it.

    python -m diptych.benchmarks.pictures [NAME ...]

`keep` draws each result that it writes and that has a picture here. By itself this draws what is stored, all or what is named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.benchmarks.peers.goals import GOALS, PEER
from diptych.benchmarks.peers.loads import STEADY

Results = Mapping[str, Any]
"""As a benchmark hands them to `keep`."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars by what is on the axis, one for each series. `lines`: what is wanted, or the bound."""

    title: str
    bars: Mapping[str, Mapping[str, float | None]]
    lines: tuple[float, ...] = ()


def draw(file: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write a PNG."""
    from matplotlib.figure import Figure

    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6.0, 3.6 * columns), 3.4 * rows), layout="constrained")
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        series = list(dict.fromkeys(name for values in panel.bars.values() for name in values))
        width = 0.8 / max(1, len(series))
        for number, name in enumerate(series):
            found = [(place, values[name]) for place, values in enumerate(panel.bars.values()) if values.get(name) is not None]
            heights = [height for _, height in found]
            drawn = axes.bar([place + (number - (len(series) - 1) / 2) * width for place, _ in found], heights, width, label=name)
            axes.bar_label(drawn, fmt="%.3g", fontsize=6)
        for line in panel.lines:
            axes.axhline(line, linestyle="--", color="tab:red", linewidth=1)
        axes.set_xticks(range(len(panel.bars)), list(panel.bars), rotation=20, fontsize=7)
        axes.set_title(panel.title, fontsize=9)
        if len(series) > 1:
            axes.legend(fontsize=6)
    figure.suptitle(title, fontsize=8)
    figure.savefig(file, dpi=110)


def _stall(results: Results) -> list[Panel]:
    names = {"ttft": "TTFT", "tpot": "TPOT", "gap": "tokens 1 to 2", "itl": "ITL from token 2"}
    times = [
        Panel(f"{title} (ms)", {share: {each: found[name][f"{share}_ms"] for each, found in results.items()} for share in ("p50", "p99")})
        for name, title in names.items()
    ]
    return [*times, Panel("ITL p99 / p50", {each: {"": found["itl_p99_over_p50"]} for each, found in results.items()}, (1.5,))]


def _handover(results: Results) -> list[Panel]:
    spans = {name.replace("_", " "): found for name, found in results.items() if isinstance(found, Mapping)}
    return [Panel("hand-over (ms)", {name: {share: found[f"{share}_ms"] for share in ("p50", "p99")} for name, found in spans.items()})]


def _start(results: Results) -> list[Panel]:
    runs = {f"start {number}": {"": seconds} for number, seconds in enumerate(results["first_token_s"], 1)}
    return [Panel("from `diptych up` to the first token (s)", runs)]


def _memory(results: Results) -> list[Panel]:
    own = {name: {"": found["own_over_weights"]} for name, found in results["workers"].items()}
    shared = {"all workers": {"": results["weights_pss_over_weights"]}}
    return [Panel("a worker's own memory, as a share of the weights", own), Panel("weights in memory, times their size", shared, (1.0,))]


def _links(results: Results) -> list[Panel]:
    panels = []
    for transport, found in results.items():
        if isinstance(found, Mapping):
            pieces = found["pieces"].items()
            rates = {size: {"ours": each["gb_per_s"], "raw": each["raw_gb_per_s"]} for size, each in pieces}
            panels.append(Panel(f"{transport} (GB/s)", rates))
            panels.append(Panel(f"{transport}: share of the raw link", {size: {"": each["ratio"]} for size, each in pieces}, (0.9,)))
    return panels


def _engine(results: Results) -> list[Panel]:
    panels = []
    for name, found in results.items():
        decode = {str(each["rows"]): _step_of(each) for each in found["decode"]}
        prefill = {f"{each['tokens']} from {each['start']}": {"step": each["ms"], "bound": each["bound_ms"]} for each in found["prefill"]}
        panels += [Panel(f"decode, weights {name}: rows (ms)", decode), Panel(f"prefill, weights {name}: tokens (ms)", prefill)]
    return panels


def _step_of(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    eager = {"kernel by kernel": figures["eager_ms"]} if "eager_ms" in figures else {}
    return {"step": figures["ms"], **eager, "bound": max(figures["reading_ms"] or 0.0, figures["computing_ms"] or 0.0)}


def _quality(results: Results) -> list[Panel]:
    figures = {"perplexity": "perplexity", "divergence": "divergence (nats a token)", "same_token": "same likeliest token"}
    return [Panel(title, {name: {"": each[key]} for name, each in results.items()}) for key, title in figures.items()]


def _kernels(results: Results) -> list[Panel]:
    by_kernel: dict[str, dict[str, Mapping[str, float | None]]] = {}
    for each in results["kernels"]:
        times = {"ours": each["ms"], "torch": each["torch_ms"], "FlashInfer": each["flashinfer_ms"]}
        shares = {name: each["bound_ms"] / ms for name, ms in times.items() if ms}
        by_kernel.setdefault(each["kernel"], {})[each["shape"]] = shares
    return [Panel(f"{name}: share of the bound", bars) for name, bars in by_kernel.items()]


def _locks(results: Results) -> list[Panel]:
    spent = results["cpu_s_per_request"]
    processes = {name: {each: spent[each][name] for each in spent} for name in spent["open"]}
    ratios = {"all": {"": results["ratio"]}, "beside the engines": {"": results["beside_engine"]["ratio"]}}
    return [Panel("CPU seconds of a request", processes), Panel("with locks, times without", ratios, (1.0, 1.02))]


def _planner(results: Results) -> list[Panel]:
    runs = {name.removeprefix("distserve-"): found for name, found in results["runs"].items()}
    keys = [key for key in next(iter(runs.values()))["measured"] if not key.endswith("p95")]
    return [
        Panel(key, {name: {each: found[each][key] for each in ("measured", "simulated")} for name, found in runs.items()}) for key in keys
    ]


def _speed(results: Results) -> list[Panel]:
    return [Panel(f"{name} (s)", {"wall": {"": found["wall_s"]}, "CPU": {"": found["cpu_s"]}}) for name, found in results.items()]


def _step(results: Results) -> list[Panel]:
    panels = []
    for at_once, found in results.items():
        times = {name: {share: found[name][f"{share}_ms"] for share in ("p50", "p99")} for name in ("tpot", "itl", "gap")}
        panels.append(Panel(f"{at_once} at once (ms)", times))
    return panels


def _peers(results: Results) -> list[Panel]:
    measured = {name: found for name, found in results["servers"].items() if STEADY in found}
    peer = results["servers"].get(PEER, {})
    panels = []
    for goal in GOALS:
        beside = goal.value(peer) if goal.of_peer else 1.0
        lines = () if beside is None else (goal.limit * beside,)
        unit = f" ({goal.unit})" if goal.unit else ""
        panels.append(
            Panel(f"{goal.name}{unit}: {goal.wanted}", {name: {"": goal.value(found)} for name, found in measured.items()}, lines)
        )
    return panels


PICTURES: Mapping[str, Callable[[Results], list[Panel]]] = {
    "stall": _stall,
    "stall-gpu": _stall,
    "handover": _handover,
    "start": _start,
    "start-no-ray": _start,
    "memory": _memory,
    "links": _links,
    "engine": _engine,
    "engine-torch": _engine,
    "engine-gpu": _engine,
    "quality": _quality,
    "kernels": _kernels,
    "locks": _locks,
    "planner": _planner,
    "planner-speed": _speed,
    "step": _step,
    "peers": _peers,
}
"""By the name under which results are kept. autoplan's and ourselves' are courses and scatters of their own."""


def main() -> None:
    from diptych.benchmarks.record import RESULTS, describe

    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.pictures", description="Draw what is stored.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PICTURES)}; by default all that are stored")
    names = parser.parse_args().names or list(PICTURES)
    if unknown := set(names) - PICTURES.keys():
        parser.error(f"no picture is known of {', '.join(sorted(unknown))}")
    for name in names:
        stored = RESULTS / f"{name}.json"
        if stored.exists():
            document = json.loads(stored.read_text())
            draw(stored.with_suffix(".png"), f"{name}: {describe(document)}", PICTURES[name](document["results"]))
            print(stored.with_suffix(".png"))


if __name__ == "__main__":
    main()

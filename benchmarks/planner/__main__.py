"""Runs that DistServe's authors measured on A100s (OPT-13B, ShareGPT lengths), and the same simulated with our schedulers.

    python -m diptych.benchmarks.planner --traces ../shared/distserve/traces.json [--keep]

Prints measured and simulated figures of each run, what is outside of what is promised, and the errors of the paper's own simulator.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diptych.benchmarks.planner.replay import FIGURES, Comparison, compare, profile_of, read_traces, root_mean_square
from diptych.benchmarks.record import describe, keep, surroundings
from rich.console import Console
from rich.table import Table

PAPERS = "the paper's simulator: attainment 5.6 points RMSE, 10 at worst; TTFT p90 at 12 requests/s 0.47 s where 69 s were measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("../shared/distserve/traces.json"), help="measured runs (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/planner.json")
    options = parser.parse_args()
    where = surroundings()
    profile = profile_of()
    runs = {name: rows for name, rows in read_traces(options.traces).items() if name.startswith("distserve-c21d11")}
    found = [compare(name, profile, rows) for name, rows in runs.items()]
    out = Console(highlight=False, soft_wrap=True)
    out.print(describe(where), markup=False)
    out.print(table(found))
    error = root_mean_square([each.attainment_error for each in found])
    worst = max((each.attainment_error for each in found), key=abs)
    out.print(f"ours: attainment {error:.1f} points RMSE, {worst:+.1f} at worst (promised: 3 RMSE)\n{PAPERS}", markup=False)
    misses = [miss for each in found for miss in each.misses()]
    out.print(
        "\n".join(misses) or "every percentile is within what is promised (15 % below saturation, a factor of 1.5 beyond)", markup=False
    )
    if options.keep:
        results = {
            "attainment_rmse_points": error,
            "misses": misses,
            "runs": {
                each.name: {"measured": each.measured, "simulated": each.simulated, "preemptions": each.preemptions} for each in found
            },
        }
        out.print(f"kept in {keep('planner', where, {'profile': profile.source}, results)}")


def table(found: list[Comparison]) -> Table:
    made = Table("run", "attainment", *FIGURES, "preempted", title="measured → simulated (ms)")
    for each in found:
        shares = f"{each.measured['attainment']:.1%} → {each.simulated['attainment']:.1%}"
        cells = [f"{1000 * each.measured[f]:.0f} → {1000 * each.simulated[f]:.0f} ({each.ratio(f):.2f})" for f in FIGURES]
        made.add_row(each.name + (" *" if each.saturated else ""), shares, *cells, str(each.preemptions))
    made.caption = "* beyond saturation"
    return made


if __name__ == "__main__":
    main()

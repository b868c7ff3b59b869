"""`diptych workload`: workloads made from what a cluster recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..load.fitting import Fitted

workload_app = typer.Typer(no_args_is_help=True, help="Workloads for `simulate` and `plan`, from what a cluster recorded.")


@workload_app.callback()
def _workload() -> None:
    """Keeps `fit` a command of its own."""


@workload_app.command()
def fit(
    logs: Annotated[
        list[Path],
        typer.Argument(metavar="LOG…", help="Files that `router.record` named, or any that `simulate --workload` takes but a mix."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="W.json", help="Write the workload there.")],
    seed: Annotated[int, typer.Option(help="Of the draw of lengths from a log of more than 5,000 requests.")] = 0,
) -> None:
    """Make a workload from a recorded log: its rate, how bursty it is (the shape of gamma arrivals), and its lengths in pairs.

    What it writes has no end, and any rate: `simulate` and `plan` take it as `--workload`. For the very requests at the very times, give
    them the log itself.

    [bold]diptych workload fit requests.csv -o W.json[/]

    [bold]diptych plan --profile P.json --workload W.json --slo ttft=1s,tpot=100ms[/]
    """
    from ...core.errors import ConfigError
    from ..load.fitting import fit as fitted
    from .simulating import lines_of, write_text

    if out.suffix != ".json":
        raise ConfigError(f"--out {out}: a workload of this kind is JSON, and known by its ending: call it {out.stem}.json.", field="out")
    found = fitted(map(lines_of, logs), seed)
    write_text(out, found.mix.model_dump_json(indent=1, exclude_defaults=True) + "\n")
    for line in (*_lines(found), f"{out}: diptych plan --workload {out} …"):
        typer.echo(line)


def _lines(found: Fitted) -> Iterator[str]:
    from ..load.summary import percentile

    yield f"{found.requests} requests in {found.seconds:.0f} s: {found.rate:.3g} per second, ± {found.rate_error:.0%}"
    kind = "in bursts" if found.burstiness < 0.8 else "more evenly than by chance" if found.burstiness > 1.25 else "as by chance (Poisson)"
    yield f"burstiness {found.burstiness:.2f}: they come {kind}"
    for name, lengths in (("prompt", found.prompts), ("output", found.outputs)):
        p50, p90, p99 = (percentile(lengths, share) for share in (0.5, 0.9, 0.99))
        yield f"{name} tokens p50 {p50:.0f}, p90 {p90:.0f}, p99 {p99:.0f}"
    yield f"{found.hits:.0%} of prompt tokens were cached" if found.hits else "nothing was cached"

"""`diptych simulate` and `diptych plan`: what a cluster would do under a load, and which one should."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Affinity(StrEnum):
    high = "high"
    low = "low"


Profiles = Annotated[
    list[Path],
    typer.Option(
        "--profile", metavar="P.json", help="Times of the model on a device, measured or written by hand; one for each kind of device."
    ),
]
Slo = Annotated[str, typer.Option(metavar="LIMITS", help="Limits to meet jointly, as in ttft=0.2s,tpot=0.1s.")]
Workload = Annotated[
    Path | None,
    typer.Option(
        metavar="W",
        help="Requests: CSV with arrival_s,prompt_tokens,output_tokens, the same as JSONL, a BurstGPT or Azure trace, or a mix (JSON).",
    ),
]
Lengths = Annotated[
    Path | None, typer.Option(metavar="FILE", help="In place of a workload: pairs of prompt and output tokens, JSON or CSV.")
]


def simulate(
    profile: Profiles,
    plan: Annotated[Path, typer.Option(metavar="plan.yaml", help="The cluster: a config file, as `diptych up -f` takes it.")],
    slo: Slo,
    workload: Workload = None,
    lengths: Lengths = None,
    rate: Annotated[float | None, typer.Option(min=1e-3, help="Requests per second, for --lengths or a mix.")] = None,
    burstiness: Annotated[float, typer.Option(min=1e-3, help="With --lengths: shape of gamma arrivals; 1 is Poisson.")] = 1.0,
    requests: Annotated[int | None, typer.Option(min=1, help="How many at most. Default: all of a trace, else 1000.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed makes the same load.")] = 0,
    link: Annotated[str | None, typer.Option(help="The link of the profile by which KV moves. Default: its first.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="OUT", help="Write the summary and every request there.")] = None,
) -> None:
    """Simulate a cluster under a load, with the schedulers that would serve it.

    TTFT, TPOT, ITL, SLO attainment, goodput, and each worker's utilisation and queues over time. Nothing is started.

    [bold]diptych simulate --profile P.json --plan plan.yaml --workload W.csv --slo ttft=0.2s,tpot=0.1s --json OUT[/]
    """
    from .outputs import check_outputs
    from .simulating import Simulating, load_of

    check_outputs({"--json": json}, (*profile, plan, workload, lengths))
    load = load_of(workload, lengths, rate=rate, burstiness=burstiness, requests=requests, seed=seed)
    Simulating.begin(profile, plan, slo, link).run(load, json)


def plan(
    profile: Profiles,
    slo: Slo,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,nodes=N][,devices=N][,cost=C]",
            help="A kind of device that there is, by the name in its profile; without a profile of it its data sheet is taken (A100, H100, "
            "H200, B200, L40S). May be given several times. Default: those of the profiles.",
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes there are, of each kind of device that does not name its own.")] = 1,
    devices: Annotated[int, typer.Option(min=1, help="Devices of each node; likewise.")] = 8,
    affinity: Annotated[
        Affinity,
        typer.Option(
            help="high: nodes have fast links, each phase goes anywhere, on another kind of device too; low: prefill and decode share each "
            "node, and so one kind of device.",
        ),
    ] = Affinity.low,
    workload: Workload = None,
    lengths: Lengths = None,
    input: Annotated[str, typer.Option(metavar="N|A-B", help="Without a file: prompt tokens, a number or a range.")] = "256",
    output: Annotated[str, typer.Option(metavar="N|A-B", help="And output tokens.")] = "64",
    burstiness: Annotated[float, typer.Option(min=1e-3, help="Without a workload: shape of gamma arrivals; 1 is Poisson.")] = 1.0,
    rate: Annotated[float | None, typer.Option(min=1e-3, help="Requests per second to serve. Default: the most per device.")] = None,
    target: Annotated[float, typer.Option(min=0.01, max=0.999, help="The share of requests that must meet the SLO.")] = 0.9,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="How sure each simulated rate must be.")] = 0.95,
    most: Annotated[int, typer.Option(min=60, help="The most requests of one simulation; it ends when it is sure.")] = 1920,
    link: Annotated[str | None, typer.Option(help="The link of the profile by which KV moves. Default: its first.")] = None,
    cost: Annotated[float | None, typer.Option(min=1e-6, help="Of a device for an hour. Default: the profile's.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model's source, to be written into the plan.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="plan.yaml", help="Write the plan there; else it is printed.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw cost and rate of what was searched to its end there.")] = None,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Search also what cannot win, for a fuller Pareto front.")] = False,
    derive: Annotated[
        bool, typer.Option("--derive", help="Consider tp that nobody measured too, its times derived from the others'.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The same seed makes the same load.")] = 0,
) -> None:
    """Choose tp, pp, the number of workers and the kind of device of each phase: the most requests per device, or cost, within the SLO.

    [bold]diptych plan --profile P.json --lengths pairs.json --slo ttft=0.2s,tpot=0.1s --devices 4 --out plan.yaml[/]
    [bold]diptych plan --profile H100.json --device H100,devices=8,cost=3.5 --device L40S,nodes=2,devices=8,cost=0.9 --affinity high …[/]

    [bold]diptych up -f plan.yaml[/] runs what it writes.
    """
    from ..planner.site import Space
    from .devices import Asked
    from .outputs import check_outputs, check_picture
    from .planning import Planning, load_for

    check_outputs({"--out": out, "--plot": plot}, (*profile, workload, lengths))
    check_picture("--plot", plot)
    arrivals = load_for(workload, lengths, burstiness, input=input, output=output)
    planning = Planning.begin(
        Asked(tuple(profile), tuple(device or ()), Space(nodes, devices), cost, link, derive), slo, arrivals, target=target,
        confidence=confidence, most=most, paired=affinity is Affinity.low, source=model, seed=seed,
    )  # fmt: skip
    planning.run(rate, out, plot, exhaustive=exhaustive)

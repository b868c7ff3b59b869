"""`diptych bench`: open-loop load on a server that speaks OpenAI's completions, ours or another's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...core.access import Access
from ...core.errors import ConfigError, DiptychError, Unavailable
from ..supervising import state
from .reach import Ca, server_of

if TYPE_CHECKING:
    from ..load.choice import Load
    from .benching import Profiled

Url = Annotated[str | None, typer.Argument(metavar="URL", help="http://HOST:PORT of the server. Default: the cluster of that name.")]
Length = Annotated[str, typer.Option(metavar="N|A-B", help="Tokens: a number, or a range to draw from.")]
Requests = Annotated[
    int | None, typer.Option(min=1, help="How many to send, warm-up included. Default: 100, or what --seconds or --trace say.")
]
Profile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Record where each step's time goes: show it, and write a trace for ui.perfetto.dev there."),
]
ProfileSeconds = Annotated[
    float, typer.Option(min=0.1, max=600.0, metavar="S", help="Record for so long at most, from the begin of the load.")
]
Key = Annotated[str | None, typer.Option(envvar=["DIPTYCH_API_KEY", "OPENAI_API_KEY"], show_envvar=True, help="For servers that want one.")]
Goodput = Annotated[bool, typer.Option("--goodput", help="Find the highest rate at which the target share meets the SLO.")]


def bench(
    url: Url = None,
    name: Annotated[str, typer.Option("--name", "-n", help="The cluster's name on this host.")] = "default",
    model: Annotated[str | None, typer.Option("--model", "-m", help="What to ask for. Default: the first model it lists.")] = None,
    rate: Annotated[float, typer.Option(min=1e-3, help="Requests per second; with --goodput, the first rate tried.")] = 1.0,
    requests: Requests = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="Send for so long at most.")] = None,
    input: Length = "256",
    output: Length = "64",
    lengths: Annotated[Path | None, typer.Option(metavar="FILE", help="Pairs of prompt and output tokens, JSON or CSV.")] = None,
    burstiness: Annotated[float, typer.Option(help="Shape of gamma arrivals: 1 is Poisson, below 1 comes in bursts.")] = 1.0,
    constant: Annotated[bool, typer.Option("--constant", help="Arrivals at even distances.")] = False,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Arrivals in seconds, with lengths or not, JSON or CSV.")] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests at the begin of the load that are not counted.")] = 5,
    slo: Annotated[str | None, typer.Option(metavar="LIMITS", help="Limits to meet jointly, as in ttft=1s,tpot=100ms.")] = None,
    goodput: Goodput = False,
    target: Annotated[float, typer.Option(min=0.01, max=0.999, help="The share of requests that must meet the SLO.")] = 0.9,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="How sure each probe must be.")] = 0.95,
    budget: Annotated[float, typer.Option(min=1.0, metavar="S", help="Seconds the search for the goodput may take.")] = 600.0,
    probe_requests: Annotated[int, typer.Option(min=30, help="The most requests of one probe.")] = 480,
    seed: Annotated[int, typer.Option(help="The same seed makes the same load.")] = 0,
    vocabulary: Annotated[int, typer.Option(min=11, help="Prompts are random token ids below this.")] = 10_000,
    text: Annotated[bool, typer.Option("--text", help="Send prompts as words even if token ids are taken.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="S", help="A request that takes longer is an error.")] = 300.0,
    api_key: Key = None,
    ca: Ca = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write figures and every request there.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the figures there.")] = None,
    profile: Profile = None,
    profile_seconds: ProfileSeconds = 30.0,
) -> None:
    """Put an open-loop load on a server and report TTFT, TPOT, ITL, throughput and SLO attainment.

    Requests come when their time has come, whether or not earlier ones have been answered. Ctrl-C ends it and shows what there is.

    [bold]diptych bench --rate 2 --requests 200 --slo ttft=1s,tpot=100ms[/]

    [bold]diptych bench --rate 0.1 --requests 4 --profile trace.json[/]

    [bold]diptych bench http://127.0.0.1:8001 --goodput --slo ttft=1s,tpot=100ms --plot goodput.png[/]
    """
    from .benching import Bench

    if goodput and (slo is None or trace is not None):
        raise ConfigError("--goodput needs an --slo to meet, and chooses the rate itself: no --trace.", field="goodput")
    profiled = None if profile is None else _profiled(profile, profile_seconds, name, named=url is None, once=not goodput)
    access = Access(api_key, ca=ca)
    if url is None:
        faces = server_of(name, access)
        url, access = f"{faces.access.scheme}://{faces.http}", faces.access
    load = _load(trace, lengths, {"input": input, "output": output, "burstiness": burstiness, "constant": constant, "seed": seed})
    settings: dict[str, Any] = {
        "model": model, "api_key": api_key, "vocabulary": vocabulary, "seed": seed, "timeout_s": timeout, "as_text": text, "ca": access.ca,
    }  # fmt: skip
    run = Bench(url, settings, load, rate, warm_up, json, plot, profiled)
    if goodput:
        assert slo is not None
        asyncio.run(run.goodput(slo, target=target, confidence=confidence, budget_s=budget, most=probe_requests))
    elif not asyncio.run(run.once(slo, requests=requests or (None if trace or seconds else 100), seconds=seconds)):
        raise DiptychError("No request was answered.")


def _profiled(file: Path, seconds: float, name: str, *, named: bool, once: bool) -> Profiled:
    """`named`: the server is the cluster `name` of this host, whose processes are asked for what only they know."""
    from .benching import Profiled

    if not (named and once):
        raise ConfigError(
            "--profile records one load on a cluster of this host: give its --name, no URL, and no --goodput.", field="profile"
        )
    found = state.running(name)
    if found.control is None:
        raise Unavailable(f"Cluster {name!r} is still starting; `diptych status` shows how far it is.")
    return Profiled(file, seconds, found.control, found.internal_tls)


def _load(trace: Path | None, lengths: Path | None, rest: dict[str, Any]) -> Load:
    from ..load.choice import Load
    from ..load.workload import read_pairs, read_trace

    if lengths is not None:
        rest["lengths"] = tuple(read_pairs(_read(lengths), lengths.name))
    load = Load.of_trace(read_trace(_read(trace), trace.name), **rest) if trace is not None else Load(**rest)
    load.check()
    return load


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.") from None

"""`diptych top`: a running cluster, live in the terminal, by what its router's `/metrics` says."""

from __future__ import annotations

from typing import Annotated

import typer

from ...core.access import Access
from ..commands import reach


def top(
    name: Annotated[str, typer.Option("--name", "-n", help="The cluster's name on this host.")] = "default",
    server: Annotated[
        str | None, typer.Option("--server", metavar="HOST:PORT", help="The HTTP face of a router, in place of that cluster's.")
    ] = None,
    slo: Annotated[str | None, typer.Option(metavar="LIMITS", help="Show how many meet it, as in ttft=1s,tpot=100ms.")] = None,
    every: Annotated[float, typer.Option(min=0.1, metavar="S", help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show it once, since the router started, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one object, or one a line without --once.")] = False,
    api_key: reach.ApiKey = None,
    tls: reach.Tls = False,
    ca: reach.Ca = None,
) -> None:
    """Watch a cluster: workers by phase, queues, KV pools, transfers, TTFT and TPOT against an SLO.

    Rates and latencies are those of the last minute. Press q, or Ctrl-C, to end.

    [bold]diptych top --slo ttft=1s,tpot=100ms[/]

    [bold]diptych top --once --json[/]
    """
    from ..load.slo import Slo, parse_slo
    from .watching import show, watch

    limits = parse_slo(slo) if slo else Slo()
    access = Access(api_key, tls, ca)
    if server is None:
        faces = reach.server_of(name, access)
        server, access = faces.http, faces.access
    if once:
        show(server, access, limits, as_json=as_json)
    else:
        watch(server, access, limits, every, as_json=as_json)

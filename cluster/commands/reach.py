"""Where a command of `diptych` finds the router it is to ask, and what it shows there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import typer

from ...core.access import Access
from ...core.errors import Unavailable
from ..supervising import state

_PANEL = "Access"

Name = Annotated[str, typer.Option("--name", "-n", help="The cluster's name on this host.")]
Server = Annotated[
    str | None, typer.Option("--server", metavar="HOST:PORT", help="Ask this router, in place of the cluster's of that name.")
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", metavar="KEY", envvar="DIPTYCH_API_KEY", help="For a router that wants one.", rich_help_panel=_PANEL),
]
Tls = Annotated[
    bool, typer.Option("--tls", help="With --server: it speaks TLS. A cluster of this host is known to.", rich_help_panel=_PANEL)
]
Ca = Annotated[
    str | None,
    typer.Option(
        "--ca", metavar="FILE", envvar="DIPTYCH_CA", help="Know it by this authority (PEM), not the system's.", rich_help_panel=_PANEL
    ),
]


@dataclass(frozen=True, slots=True)
class Faces:
    """Where a cluster's router listens, host:port, and how one comes in."""

    http: str
    grpc: str
    access: Access


def server_of(name: str, access: Access) -> Faces:
    """The faces of the running cluster `name` on this host; `Unavailable` if there is none, with what to do."""
    found = state.running(name)
    if found.http is None or found.grpc is None:
        raise Unavailable(f"Cluster {name!r} is still starting; `diptych status` shows how far it is.")
    return Faces(found.http, found.grpc, known(found, access))


def known(found: state.ClusterState, access: Access) -> Access:
    """What is shown to a cluster of this host: that it speaks TLS, and by whom it is known, needs not be said."""
    return replace(access, tls=access.tls or found.tls, ca=access.ca or found.ca)


def reach(server: str | None, name: str, access: Access) -> tuple[str, Access]:
    """The gRPC face to ask: `server`, or that of the cluster `name` on this host."""
    if server is not None:
        return server, access
    faces = server_of(name, access)
    return faces.grpc, faces.access

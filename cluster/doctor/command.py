"""`diptych doctor`: what is wrong with this host, this config or this cluster, and what mends it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ...core.errors import ConfigError, DiptychError
from .finding import Finding, State, wrong


def doctor(
    file: Annotated[Path | None, typer.Option("--file", "-f", metavar="cluster.yaml", help="The config to check, as for `up`.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model, as for `up`.")] = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="The cluster's name on this host. Default: default.")] = None,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="As for `up`: plain processes, without Ray.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list of findings.")] = False,
) -> None:
    """Check this host, a config, and the cluster of that name if it runs: what is wrong, and what mends it.

    Without a running cluster it checks what `diptych up` would need: packages, compiler, GPUs, memory, ports, model, Ray, and whether KV
    can move as configured. Of a running one it tries the link between every pair of workers, by handing some KV over.

    Exit status 1 if something is wrong; notes are not.
    """
    from rich.console import Console

    from .printing import line, table, verdict

    overrides = {"model.source": model, "name": name, "ray.enabled": False if no_ray else None}
    found: list[Finding] = []
    console = Console(highlight=False)
    for finding in _findings(file, overrides):
        found.append(finding)
        if console.is_terminal and not as_json:
            console.print(line(finding))
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    elif not console.is_terminal:
        Console(highlight=False, width=160).print(table(found))
    if not as_json:
        console.print(verdict(found))
    if any(finding.state is State.WRONG for finding in found):
        raise typer.Exit(1)


def _findings(file: Path | None, overrides: dict[str, Any]) -> Iterator[Finding]:
    from ..supervising import state
    from ..supervising.config_file import read_config
    from .examining import examine
    from .finding import ok

    try:
        config = read_config(file, overrides)
    except ConfigError as error:
        yield wrong("config", error.message, "`diptych config schema` lists every key.", error.field)
        return
    yield ok("config", f"{file} is right" if file else "the defaults")
    running = state.read(config.name)
    try:
        yield from examine(config, running)
    except DiptychError as error:
        yield wrong("doctor", error.message, "")

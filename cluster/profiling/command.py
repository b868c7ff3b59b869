"""`diptych profile`: measure this host for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ...core.errors import ConfigError
from ...core.quantization import Quantization


def profile(
    out: Annotated[Path, typer.Option(metavar="P.json", help="Write the profile there.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="As for `diptych up`. Default: the demo model.")] = None,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Type of weights and KV cache.")] = "bfloat16",
    quantization: Annotated[
        Quantization | None, typer.Option(help="As for `diptych up`, for whose cluster the profile then is. Default: none.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of a worker. Default: those that `diptych up` gives each of two on this host.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each step; their median counts.")] = 5,
    clusters: Annotated[
        bool, typer.Option("--clusters/--no-clusters", help="Start two small clusters too; without them what serving adds is assumed.")
    ] = True,
) -> None:
    """Measure this host for a model: the times that `diptych simulate` and `diptych plan` reckon with.

    Steps of the engine on the cores of one worker and on all, KV over each transport, then two small clusters: what a request, a step and a
    message take besides, and each phase while the other runs. Takes a few minutes; nothing else should run meanwhile.

    [bold]diptych profile --out P.json[/]
    """
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out} cannot be written: there is no directory {out.parent}.", field="out")
    from ..commands.preparing import prepare_here
    from .measuring import profile_here

    directory = prepare_here(model or "demo", dtype, None, None, None, quantization or Quantization.NONE)
    profile_here(directory, threads=threads, repeats=repeats, clusters=clusters, out=out)

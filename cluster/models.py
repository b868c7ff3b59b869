"""Which prepared model a config means, and making it where there is none yet."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ..core.config import ClusterConfig
from ..core.errors import ConfigError, ModelError
from ..core.model import CARD, read_card
from .terminal import Terminal


def find_model(config: ClusterConfig) -> Path | None:
    """The prepared model, if there is one; None if it has to be prepared first. `ConfigError` if nothing can be meant."""
    source = config.model.source
    if source is None:
        raise ConfigError("model.source: no model named.", field="model.source")
    directory = Path(source).expanduser().absolute()
    if (directory / CARD).is_file():
        card = read_card(directory)
        if "dtype" in config.model.model_fields_set and config.model.dtype != card.dtype:
            raise ConfigError(
                f"model.dtype: {directory} is prepared as {card.dtype}, not {config.model.dtype}. "
                "Leave --dtype out, or prepare the source again.",
                field="model.dtype",
            )
        return directory
    raise ConfigError(f"model.source: {source} does not exist.", field="model.source")


async def prepare_model(config: ClusterConfig, terminal: Terminal, stop: asyncio.Event) -> Path | None:
    raise ModelError("not yet")

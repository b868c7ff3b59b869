"""A real cluster for the length of a benchmark: what `diptych up` starts, with free ports."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from diptych.cluster.commands.up import Served, Up
from diptych.core.config import load_config

Measure = Callable[[Served], Awaitable[None]]


def settings(*, prefill: int, decode: int, model: str | None, dtype: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A config for plain processes. `prefill` 0 makes the decode workers colocated servers. `sections` are merged in."""
    config: dict[str, Any] = {
        "name": "benchmark",
        "model": {"source": model, "dtype": dtype},
        "prefill": {"workers": prefill},
        "decode": {"workers": decode},
        "router": {"http_port": 0, "grpc_port": 0, "local_prefill": "auto" if prefill else "always"},
        "ray": {"enabled": False},
    }
    for name, section in sections.items():
        config.setdefault(name, {}).update(section)
    return config


def serve(config: dict[str, Any], measure: Measure) -> None:
    """Start the cluster `config` describes, run `measure` once it serves, end the cluster. Raises what `measure` raised, and
    `InterruptedError` if the cluster ended before it was through."""
    ended: list[BaseException | None] = []

    async def when_up(served: Served) -> bool:
        try:
            await measure(served)
        except BaseException as error:  # noqa: BLE001  whatever it is, the cluster is ended first
            ended.append(error)
        else:
            ended.append(None)
        return True

    Up(load_config(config), when_up=when_up).run()
    if not ended:
        raise InterruptedError("The cluster ended before the measurement.")
    if ended[0] is not None:
        raise ended[0]

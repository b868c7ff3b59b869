"""A real cluster for as long as something is asked of it: what `diptych up` starts, on free ports, ended when that is through."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ...core.config import load_config
from ...core.errors import Unavailable
from .up import Served, Up

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
    `Unavailable` if the cluster ended before it was through."""
    ended: list[Exception | None] = []

    async def when_up(served: Served) -> bool:
        try:
            await measure(served)
        except Exception as error:  # noqa: BLE001  whatever it is, the cluster is ended first
            ended.append(error)
        else:
            ended.append(None)
        return True

    Up(load_config(config), when_up=when_up).run()
    if not ended:
        raise Unavailable("The cluster ended before it had been asked everything.")
    if ended[0] is not None:
        raise ended[0]

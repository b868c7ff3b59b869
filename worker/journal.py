"""A worker's log of its attempts: one line at the end of each, with the id by which the router and its client know the request."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from ..core.clock import Clock
from ..core.commands import Failed, Finished, FirstTokens, HandedOver
from ..core.errors import Cancelled
from ..core.notes import note
from ..core.request import Request
from .attempts import Terminal

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Open:
    request_id: str
    prompt_tokens: int
    since: float
    first: dict[str, Any] = field(default_factory=dict)
    """What is known of its prompt since that was read."""


class Journal:
    """Told of every attempt that opens, and of every one that ends."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: dict[str, _Open] = {}

    def opened(self, attempt_id: str, request: Request) -> None:
        self._open[attempt_id] = _Open(request.request_id, len(request.prompt_ids), self._clock.now())

    def first(self, event: FirstTokens) -> None:
        """Its prompt has been read."""
        if event.attempt_id in self._open:
            times = {"queued_seconds": round(event.queued, 5), "computed_seconds": round(event.computed, 5)}
            self._open[event.attempt_id].first.update(times, prompt_cached=event.cached_tokens)

    def ended(self, event: Terminal) -> None:
        match event:
            case HandedOver(attempt_id, kv_bytes, seconds, transport, exposed):
                moved: dict[str, Any] = {"kv_bytes": kv_bytes, "transfer_seconds": round(seconds, 5), "exposed_seconds": round(exposed, 5)}
                self._say(attempt_id, "handed over", transport=transport, **moved)
            case Finished(attempt_id, cached, local, recomputed):
                self._say(attempt_id, "finished", cached_tokens=cached, local_prefill_tokens=local, recomputed_tokens=recomputed)
            case Failed(attempt_id, error):
                level = logging.INFO if isinstance(error, Cancelled) else logging.WARNING
                self._say(attempt_id, "failed", level=level, code=error.code, error=error.message)

    def lost(self, attempt_id: str) -> None:
        """Its router is gone."""
        self._say(attempt_id, "stopped: the router is gone")

    def _say(self, attempt_id: str, what: str, *, level: int = logging.INFO, **fields: Any) -> None:
        known = self._open.pop(attempt_id, None)
        if known is not None:
            seconds = round(self._clock.now() - known.since, 4)
            head: dict[str, Any] = {
                "request": known.request_id,
                "attempt": attempt_id,
                "prompt_tokens": known.prompt_tokens,
                "seconds": seconds,
            }
            note(log, what, level=level, **head, **known.first, **fields)

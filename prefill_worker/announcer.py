"""From the engine's thread to the source: which layers of which rows are stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Tables = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Positions [start, stop) of a transfer's prompt, computed by one row of a step into `tables`."""

    transfer_id: str
    start: int
    stop: int
    tables: Tables


class Computed(Protocol):
    """`Source.computed`."""

    def __call__(self, transfer_id: str, layers: tuple[int, ...], start: int, stop: int, tables: Tables) -> None: ...


class Announcer:
    """Wakes the asyncio thread for a stored layer, once: layers stored before it has woken up travel together."""

    def __init__(self, computed: Computed, call_soon: Callable[[Callable[[], None]], None]) -> None:
        """`call_soon` has a call made on the asyncio thread, in order, from any thread."""
        self._computed, self._call_soon = computed, call_soon
        self._stored: deque[tuple[tuple[Stretch, ...], int]] = deque()
        self._woken = False

    def on_layer(self, stretches: tuple[Stretch, ...]) -> Callable[[int], None]:
        """What the engine's thread calls with each layer it has stored of a step that computes `stretches`."""

        def stored(layer: int) -> None:
            self._stored.append((stretches, layer))
            if not self._woken:
                self._woken = True
                self._call_soon(self._announce)

        return stored

    def _announce(self) -> None:
        # Before the queue is emptied: a layer stored from here on wakes this thread again.
        self._woken = False
        while self._stored:
            stretches, layer = self._stored.popleft()
            layers = [layer]
            while self._stored and self._stored[0][0] is stretches:
                layers.append(self._stored.popleft()[1])
            for stretch in stretches:
                self._computed(stretch.transfer_id, tuple(layers), stretch.start, stretch.stop, stretch.tables)

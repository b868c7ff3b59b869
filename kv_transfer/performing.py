"""How a shell carries out what its machine asks for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from ..core.recordings import Doing
from ..core.spans import span

A = TypeVar("A")


class Performer(Generic[A]):
    """Gives actions to `act` one by one, in order; those that an action causes come behind those asked for before it. `rest` is called
    when nothing is left to do."""

    def __init__(self, act: Callable[[A], None], rest: Callable[[], None]) -> None:
        self._act = act
        self._rest = rest
        self._actions: deque[A] = deque()
        self._acting = False

    def do(self, actions: list[A]) -> None:
        self._actions.extend(actions)
        if self._acting:
            return
        self._acting = True
        with span(Doing.TRANSFER):
            try:
                while self._actions:
                    self._act(self._actions.popleft())
            finally:
                self._acting = False
                self._rest()

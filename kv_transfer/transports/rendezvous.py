"""The store through which the ends of a torch process group find each other: every key set here is told to the others.

So a group opens no port but its own, needs none guessed, and its rendezvous ends with the lane, or the worker's channel, that carries it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from threading import Condition

from torch.distributed.distributed_c10d import Store


class ToldStore(Store):
    """What torch needs of a store to make a group. torch calls from its own thread; `heard` and `close` come from another."""

    def __init__(self, tell: Callable[[str, bytes], None], wait_s: float) -> None:
        """`tell(key, value)`: say it to the other ends, from any thread. `wait_s`: how long to wait for what they have not yet said."""
        super().__init__()
        self._tell = tell
        self._wait_s = wait_s
        self._values: dict[str, bytes] = {}
        self._changed = Condition()
        self._closed = False

    def heard(self, key: str, value: bytes) -> None:
        """Another end has set `key`."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def close(self) -> None:
        """Whoever waits gets an error at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def set(self, key: str, value: str | bytes) -> None:
        said = value.encode() if isinstance(value, str) else bytes(value)
        self.heard(key, said)
        self._tell(key, said)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        with self._changed:
            there = self._changed.wait_for(lambda: self._closed or all(key in self._values for key in keys), self._wait_s)
        if self._closed or not there:
            raise ConnectionError("it was given up" if self._closed else f"the other end said nothing within {self._wait_s:g} s")

    def check(self, keys: list[str]) -> bool:
        """Whether all of them are set by now."""
        with self._changed:
            return all(key in self._values for key in keys)

    def has_extended_api(self) -> bool:
        return False

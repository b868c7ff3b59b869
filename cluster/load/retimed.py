"""A trace at another rate than it was recorded at. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from ...core.errors import ConfigError
from .workload import Arrival


@dataclass(frozen=True, slots=True)
class Retimed:
    """The requests of a trace with their lengths, tenants and prefixes, in their order, with their gaps scaled alike; over and over.
    Prefixes of the last time are known the next time."""

    requests: tuple[Arrival, ...]
    seconds: float
    """From the first of them to the first of the next time."""

    @classmethod
    def of(cls, requests: Sequence[Arrival], name: str) -> Retimed:
        """`name`: the file's, for the `ConfigError` where all came at once, which at no rate is anything else."""
        span = requests[-1].at - requests[0].at
        if span <= 0:
            raise ConfigError(
                f"{name}: its requests all come at one moment, and a plan wants them at other rates. --lengths takes their lengths alone.",
                field="workload",
            )
        return cls(tuple(requests), span * len(requests) / (len(requests) - 1))

    def arrivals(self, rate: float, seed: int = 0) -> Iterator[Arrival]:
        """Endless, at `rate` requests per second. `seed`: with 0 it begins with the first request, with another at another."""
        many = len(self.requests)
        scale, begin = many / self.seconds / rate, 7919 * seed % many
        first = self.requests[begin].at
        for number in count():
            turn, which = divmod(begin + number, many)
            request = self.requests[which]
            yield replace(request, number=number, at=(turn * self.seconds + request.at - first) * scale)

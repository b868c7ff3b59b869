"""A load as the command line describes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from ...core.errors import ConfigError
from . import arrivals
from .lengths import Pair, drawn, parse_range, shuffled
from .workload import Arrival, arrivals_of


@dataclass(frozen=True, slots=True)
class Load:
    """`times`: of a trace, which has an end; without one arrivals are drawn at a rate. `lengths`: pairs to draw from (or a trace's
    own, in its order); without them they are drawn from the ranges `input` and `output`."""

    input: str = "256"
    output: str = "64"
    burstiness: float = 1.0
    constant: bool = False
    seed: int = 0
    lengths: tuple[Pair, ...] = ()
    times: tuple[float, ...] = ()
    in_order: bool = False

    @classmethod
    def of_trace(cls, moments: Sequence[tuple[float, Pair | None]], **rest: object) -> Load:
        """Times of a trace, and its lengths if it has them; lengths given besides are then one too many."""
        pairs = tuple(pair for _, pair in moments if pair is not None)
        times = tuple(at for at, _ in moments)
        if pairs and rest.get("lengths"):
            raise ConfigError("The trace has lengths of its own: leave --lengths out.", field="lengths")
        if pairs and len(pairs) != len(times):
            raise ConfigError("Some rows of the trace have lengths and some have none.", field="trace")
        return cls(times=times, **{**rest, **({"lengths": pairs, "in_order": True} if pairs else {})})  # type: ignore[arg-type]

    def check(self) -> None:
        """Raises `ConfigError` for what no load can be made from."""
        if self.burstiness <= 0:
            raise ConfigError("--burstiness must be above 0; 1 is a Poisson process.", field="burstiness")
        if self.constant and self.burstiness != 1.0:
            raise ConfigError("--constant arrivals have no --burstiness: give either.", field="burstiness")
        if self.times and (self.constant or self.burstiness != 1.0):
            raise ConfigError("--trace says when requests come: leave --constant and --burstiness out.", field="trace")
        next(self._pairs(0))

    def arrivals(self, rate: float, variant: int = 0) -> Iterator[Arrival]:
        """The load at `rate` requests per second; endless but for a trace. `variant`: another draw of the same load, with
        other prompts: a server keeps the prefixes of those it was asked before."""
        seed = self.seed + 7919 * variant
        return arrivals_of(self._times(rate, seed), self._pairs(seed), variant)

    def _times(self, rate: float, seed: int) -> Iterable[float]:
        if self.times:
            return self.times
        return arrivals.constant(rate) if self.constant else arrivals.gamma(rate, self.burstiness, seed)

    def _pairs(self, seed: int) -> Iterator[Pair]:
        if self.in_order:
            return chain.from_iterable(repeat(self.lengths))
        if self.lengths:
            return shuffled(self.lengths, seed)
        return drawn(parse_range(self.input, "input"), parse_range(self.output, "output"), seed)

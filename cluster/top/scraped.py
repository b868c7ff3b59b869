"""What a router's `/metrics` said at one moment, and what changed between two. Pure but for the parsing of Prometheus' text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Scrape:
    """`at`: seconds of the caller's clock. `values`: of every sample, by its name and sorted labels."""

    at: float
    values: dict[tuple[str, Labels], float]

    def of(self, name: str, **where: str) -> Iterator[tuple[dict[str, str], float]]:
        """The samples of this name with at least these labels."""
        for (found, pairs), value in self.values.items():
            labels = dict(pairs)
            if found == name and all(labels.get(key) == wanted for key, wanted in where.items()):
                yield labels, value

    def total(self, name: str, **where: str) -> float:
        return sum(value for _, value in self.of(name, **where))

    def by(self, name: str, label: str, **where: str) -> dict[str, float]:
        """Sums by the values of a label; those that are 0 are left out."""
        sums: dict[str, float] = {}
        for labels, value in self.of(name, **where):
            sums[labels[label]] = sums.get(labels[label], 0.0) + value
        return {key: value for key, value in sums.items() if value}


NOTHING = Scrape(0.0, {})
"""Before anything was counted."""


def parse(text: str, at: float) -> Scrape:
    """Raises `ValueError` for what is not Prometheus' text format."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return Scrape(at, {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples})


@dataclass(frozen=True, slots=True)
class Change:
    """From one scrape to a later one. A counter that is smaller than it was has begun anew, with its router."""

    before: Scrape
    now: Scrape

    @property
    def seconds(self) -> float:
        return self.now.at - self.before.at

    def more(self, name: str, **where: str) -> float:
        """By how much a counter grew."""
        new, old = self.now.total(name, **where), self.before.total(name, **where)
        return new - old if new >= old else new

    def rate(self, name: str, **where: str) -> float | None:
        """A second; None if no time lies between the two."""
        return self.more(name, **where) / self.seconds if self.before.values and self.seconds > 0 else None

    def _buckets(self, name: str, where: dict[str, str]) -> list[tuple[float, float]]:
        """(upper bound, how many more are at or below it), ascending."""
        bounds: dict[str, None] = dict.fromkeys(labels["le"] for labels, _ in self.now.of(f"{name}_bucket", **where))
        return sorted((float(bound), self.more(f"{name}_bucket", le=bound, **where)) for bound in bounds)

    def quantile(self, name: str, q: float, **where: str) -> float | None:
        """Of a histogram's new observations, as Prometheus' `histogram_quantile` does; None of none. Beyond the last bound it is that."""
        buckets = self._buckets(name, where)
        if not buckets or buckets[-1][1] <= 0:
            return None
        rank, low, below = q * buckets[-1][1], 0.0, 0.0
        for bound, count in buckets:
            if count >= rank and count > below:
                return low if bound == float("inf") else low + (bound - low) * (rank - below) / (count - below)
            low, below = (low if bound == float("inf") else bound), count
        return low

    def share_within(self, name: str, limit: float, **where: str) -> float | None:
        """Which share of a histogram's new observations is at most `limit`, straight between its bounds; None of none."""
        buckets = self._buckets(name, where)
        if not buckets or buckets[-1][1] <= 0:
            return None
        low, below, all_of = 0.0, 0.0, buckets[-1][1]
        for bound, count in buckets:
            if limit <= bound:
                part = 0.0 if bound == float("inf") else (limit - low) / (bound - low)
                return (below + (count - below) * part) / all_of
            low, below = bound, count
        return 1.0

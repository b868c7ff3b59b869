"""What a request must meet to count: limits on its times, all at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...core.errors import ConfigError
from .answer import Answer

_LIMIT = re.compile(r"^(ttft|tpot|e2e)=(\d+(?:\.\d*)?|\.\d+)(ms|s)?$")


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds; None: any."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def met(self, answer: Answer) -> bool:
        """Whether the request ended well within every limit."""
        return answer.error is None and self.within(answer.ttft, answer.tpot, answer.e2e)

    def within(self, ttft: float | None, tpot: float | None, e2e: float | None) -> bool:
        """Of a request's times. One token has no TPOT and exceeds none."""
        pairs = ((self.ttft, ttft), (self.tpot, tpot), (self.e2e, e2e))
        return all(limit is None or value is None or value <= limit for limit, value in pairs)

    def __str__(self) -> str:
        named = (("ttft", self.ttft), ("tpot", self.tpot), ("e2e", self.e2e))
        return ",".join(f"{name}={limit * 1000:g}ms" for name, limit in named if limit is not None)


def parse_slo(text: str) -> Slo:
    """`ttft=1s,tpot=100ms`; `ConfigError` for anything else."""
    limits: dict[str, float] = {}
    for part in text.replace(" ", "").split(","):
        match = _LIMIT.match(part.lower())
        if not match or match[1] in limits:
            raise ConfigError(f"--slo {part!r}: give each of ttft, tpot, e2e at most once, as in ttft=1s,tpot=100ms.", field="slo")
        if match[3] is None:
            raise ConfigError(f"--slo {part!r} has no unit: {part}s is seconds, {part}ms milliseconds.", field="slo")
        limits[match[1]] = float(match[2]) / (1000 if match[3] == "ms" else 1)
        if not limits[match[1]]:
            raise ConfigError(f"--slo {part!r}: no request takes no time; a limit is above 0.", field="slo")
    return Slo(**limits)

"""How long requests are: endless pairs of prompt and output tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...core.errors import ConfigError

Pair = tuple[int, int]
"""Prompt tokens and output tokens, each at least 1."""
_P = TypeVar("_P")


@dataclass(frozen=True, slots=True)
class Range:
    """Lengths from `low` to `high`, both included, all equally likely."""

    low: int
    high: int

    def draw(self, random: random.Random) -> int:
        return random.randint(self.low, self.high)


def parse_range(text: str, field: str) -> Range:
    """`256` or `64-512`; `ConfigError` naming `field` for anything else."""
    low, dash, high = text.partition("-")
    if not (low.isdecimal() and (high.isdecimal() or not dash)):
        raise ConfigError(f"{field} {text!r}: give a number of tokens (256) or a range (64-512).", field=field)
    found = Range(int(low), int(high) if dash else int(low))
    if not 1 <= found.low <= found.high:
        raise ConfigError(f"{field} {text!r}: the first number must be at least 1, the second no less than the first.", field=field)
    return found


def drawn(prompt: Range, output: Range, seed: int) -> Iterator[Pair]:
    """Pairs drawn independently."""
    draw = random.Random(f"lengths {seed}")
    while True:
        yield prompt.draw(draw), output.draw(draw)


def shuffled(pairs: Sequence[_P], seed: int) -> Iterator[_P]:
    """`pairs` in random order, each once, then again in another order: a load of their own mixture however long it is."""
    draw = random.Random(f"lengths {seed}")
    order = list(pairs)
    while True:
        draw.shuffle(order)
        yield from order

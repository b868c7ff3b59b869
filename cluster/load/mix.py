"""A load of several streams at once: tenants with their own rates and lengths, prompts that begin alike. Pure."""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Iterator
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...core.errors import ConfigError
from . import arrivals
from .lengths import drawn, parse_range, shuffled
from .workload import Arrival

Lengths = tuple[int, int] | tuple[int, int, int]
"""Tokens of prompt and output; a third number says how many of the prompt's are the same for all of the stream that have one."""


class Stream(BaseModel):
    """Requests of one tenant. `pairs`: lengths to draw from in place of the ranges `prompt` and `output`.

    With `prefixes` each prompt begins with one of so many texts of `prefix_tokens` tokens, drawn evenly, before its own `prompt`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    tenant: str = ""
    rate: float = Field(gt=0, description="Requests per second.")
    burstiness: float = Field(1.0, gt=0, description="Shape of gamma arrivals: 1 is Poisson, below 1 comes in bursts.")
    prompt: str = "256"
    output: str = "64"
    pairs: tuple[Lengths, ...] = ()
    prefixes: int = Field(0, ge=0)
    prefix_tokens: int = Field(0, ge=0)


class Mix(BaseModel):
    """Streams that come together; `rate` of the whole scales all alike."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    streams: tuple[Stream, ...] = Field(min_length=1)

    @property
    def rate(self) -> float:
        return sum(stream.rate for stream in self.streams)

    def arrivals(self, rate: float, seed: int = 0) -> Iterator[Arrival]:
        """Endless, in order of time, at `rate` requests per second of all streams together."""
        scale = rate / self.rate
        each = [_requests(stream, number, stream.rate * scale, seed) for number, stream in enumerate(self.streams)]
        for number, arrival in enumerate(heapq.merge(*each, key=lambda arrival: arrival.at)):
            yield replace(arrival, number=number)


def _requests(stream: Stream, number: int, rate: float, seed: int) -> Iterator[Arrival]:
    name = f"{seed} stream {number}"
    own = 7919 * (number + 1) + seed
    lengths: Iterator[Lengths] = (
        shuffled(stream.pairs, own)
        if stream.pairs
        else drawn(parse_range(stream.prompt, "prompt"), parse_range(stream.output, "output"), own)
    )
    draw = random.Random(f"prefixes {name}")
    times = arrivals.gamma(rate, stream.burstiness, own)
    for turn, (at, (prompt, output, *shared)) in enumerate(zip(times, lengths, strict=False)):
        within = shared[0] if shared else 0
        ahead = stream.prefix_tokens if stream.prefixes else 0
        which = draw.randrange(stream.prefixes) if stream.prefixes else 0
        prefix = 1 + number * 65536 + which if ahead or within else 0
        yield Arrival(turn, at, prompt + ahead, output, tenant=stream.tenant, prefix=prefix, prefix_tokens=ahead + within)


def parse_mix(text: str, name: str) -> Mix:
    """From JSON; `ConfigError` names the key that is wrong."""
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ConfigError(
                f"{name} is no object, and a mix is one with `streams`; requests, each with its time, go into a file .csv or .jsonl, "
                "one a line, and pairs of lengths go to --lengths.",
                field="workload",
            )
        mix = Mix.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}.", field="workload") from None
    except ValueError as error:
        raise ConfigError(f"{name} is not valid JSON: {error}.", field="workload") from None
    for number, stream in enumerate(mix.streams):
        for key, lengths in (("prompt", stream.prompt), ("output", stream.output)):
            parse_range(lengths, f"{name}: streams.{number}.{key}")
        if any(prompt < 1 or output < 1 for prompt, output, *_ in stream.pairs):
            raise ConfigError(f"{name}: streams.{number}.pairs: every length is at least 1.", field="workload")
        if any(not 0 <= shared <= prompt for prompt, _, *rest in stream.pairs for shared in rest):
            raise ConfigError(f"{name}: streams.{number}.pairs: a third number is at most the first.", field="workload")
    return mix

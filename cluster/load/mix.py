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
from .workload import Arrival, arrivals_of


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
    pairs: tuple[tuple[int, int], ...] = ()
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
    pairs = (
        shuffled(stream.pairs, own)
        if stream.pairs
        else drawn(parse_range(stream.prompt, "prompt"), parse_range(stream.output, "output"), own)
    )
    draw = random.Random(f"prefixes {name}")
    for arrival in arrivals_of(arrivals.gamma(rate, stream.burstiness, own), pairs):
        prefix = 1 + number * 65536 + draw.randrange(stream.prefixes) if stream.prefixes else 0
        ahead = stream.prefix_tokens if stream.prefixes else 0
        yield replace(arrival, tenant=stream.tenant, prefix=prefix, prefix_tokens=ahead, prompt_tokens=arrival.prompt_tokens + ahead)


def parse_mix(text: str, name: str) -> Mix:
    """From JSON; `ConfigError` names the key that is wrong."""
    try:
        mix = Mix.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}.", field="workload") from None
    except ValueError as error:
        raise ConfigError(f"{name} is not valid JSON: {error}.", field="workload") from None
    for number, stream in enumerate(mix.streams):
        for key, lengths in (("prompt", stream.prompt), ("output", stream.output)):
            parse_range(lengths, f"{name}: streams.{number}.{key}")
        if any(prompt < 1 or output < 1 for prompt, output in stream.pairs):
            raise ConfigError(f"{name}: streams.{number}.pairs: every length is at least 1.", field="workload")
    return mix

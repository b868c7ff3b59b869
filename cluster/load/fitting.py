"""A workload made from a recorded one: its rate, how bursty it is, and its lengths. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from math import sqrt
from statistics import fmean, pvariance

from ...core.errors import ConfigError
from .mix import Lengths, Mix, Stream
from .workload import Arrival

LEAST = 20
"""Requests from which a rate and a burstiness can be told: within a quarter and a half of what they are."""
MOST_PAIRS = 5000
"""Of more requests so many are drawn: lengths at p99 are then right to a hundredth of the requests' rank."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """`rate_error`: one standard error, as a share. `hits`: the share of prompt tokens that were cached."""

    requests: int
    seconds: float
    rate: float
    rate_error: float
    burstiness: float
    lengths: tuple[Lengths, ...]
    prompts: Sequence[int]
    outputs: Sequence[int]
    hits: float

    @property
    def mix(self) -> Mix:
        """As `--workload` takes it."""
        return Mix(streams=(Stream(rate=self.rate, burstiness=self.burstiness, pairs=self.lengths),))


def fit(logs: Iterable[Iterable[Arrival]], seed: int = 0) -> Fitted:
    """From the requests of one record or of several: gaps are counted within each. `ConfigError` if they are too few."""
    each = [list(requests) for requests in logs]
    gaps = [later.at - earlier.at for requests in each for earlier, later in pairwise(requests)]
    requests = list(chain.from_iterable(each))
    seconds = sum(gaps)
    if len(requests) < LEAST or not seconds:
        raise ConfigError(
            f"The log has {len(requests)} requests in {seconds:g} s; a fit needs {LEAST} that do not all come at once.", field="log"
        )
    shape = gamma_shape(gaps)
    drawn = requests if len(requests) <= MOST_PAIRS else random.Random(f"fit {seed}").sample(requests, MOST_PAIRS)
    prompts = sorted(request.prompt_tokens for request in requests)
    return Fitted(
        requests=len(requests),
        seconds=seconds,
        rate=round(len(gaps) / seconds, 6),
        rate_error=1 / sqrt(shape * len(gaps)),
        burstiness=round(shape, 4),
        lengths=tuple(map(_lengths, drawn)),
        prompts=prompts,
        outputs=sorted(request.output_tokens for request in requests),
        hits=sum(request.prefix_tokens for request in requests) / sum(prompts),
    )


def _lengths(request: Arrival) -> Lengths:
    if request.prefix_tokens:
        return request.prompt_tokens, request.output_tokens, request.prefix_tokens
    return request.prompt_tokens, request.output_tokens


def gamma_shape(gaps: Sequence[float]) -> float:
    """The shape of gamma-distributed gaps with the mean and the variance of these; 1 of fewer than two, or of gaps that are all alike.

    By moments, not by likelihood: times are rounded (BurstGPT's to seconds), and a gap of nothing has no logarithm.
    """
    spread = pvariance(gaps) if len(gaps) > 1 else 0.0
    return fmean(gaps) ** 2 / spread if spread else 1.0

"""Times fitted to measured steps: relative least squares, so that 1 % of a short step counts as much as 1 % of a long one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ...core.errors import ConfigError
from .latency import DecodeTimes, PrefillTimes
from .profile import Residuals


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """A measured step of `batch` prompts of `length` tokens each."""

    batch: int
    length: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """A measured step of `batch` sequences that attend to `context` tokens each."""

    batch: int
    context: int
    seconds: float


def fit_prefill(points: Sequence[PrefillPoint]) -> tuple[PrefillTimes, Residuals]:
    """Raises `ConfigError` for fewer than three points."""
    terms = [(1.0, point.batch * point.length, point.batch * point.length**2) for point in points]
    (constant, token, pair), residuals = fit(terms, [point.seconds for point in points])
    return PrefillTimes(constant=constant, token=token, pair=pair), residuals


def fit_decode(points: Sequence[DecodePoint]) -> tuple[DecodeTimes, Residuals]:
    """Raises `ConfigError` for fewer than three points."""
    terms = [(1.0, point.batch * point.context, point.batch) for point in points]
    (constant, context, row), residuals = fit(terms, [point.seconds for point in points])
    return DecodeTimes(constant=constant, context=context, row=row), residuals


def fit(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[tuple[float, ...], Residuals]:
    """The coefficients, none below 0, that make the mean of the squared relative errors least, and these errors.

    A time has no negative part. With as few terms as here the best non-negative solution is found by trying every subset of them.
    """
    width = len(terms[0]) if terms else 0
    if len(terms) < max(3, width):
        raise ConfigError(f"{len(terms)} measured steps are too few to fit {width or 3} terms to.", field="profile")
    measured = np.asarray(seconds, dtype=float)
    if not (measured > 0).all():
        raise ConfigError("A measured step took no time.", field="profile")
    relative = np.asarray(terms, dtype=float) / measured[:, None]
    best, least = np.zeros(width), np.inf
    for count in range(1, width + 1):
        for chosen in map(list, combinations(range(width), count)):
            scale = np.abs(relative[:, chosen]).max(axis=0)
            found = np.linalg.lstsq(relative[:, chosen] / scale, np.ones(len(terms)), rcond=None)[0] / scale
            error = float(((relative[:, chosen] @ found - 1) ** 2).mean())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(width), error
                best[chosen] = found
    errors = np.abs(relative @ best - 1)
    return tuple(map(float, best)), Residuals(points=len(terms), mean=float(errors.mean()), worst=float(errors.max()))

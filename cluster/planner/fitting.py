"""Times fitted to measured steps: relative least squares, so that 1 % of a short step counts as much as 1 % of a long one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import numpy as np

from ...core.errors import ConfigError
from .latency import DecodeTimes, PrefillTimes, StepTimes, Work, step_seconds
from .profile import Residuals

LEAST_PIECE = 4
"""Points of a piece: three terms, and one that shows whether they fit."""
NOISE = 0.03
"""One piece that is nowhere off by more than times of one step differ is enough."""
WORTH = 0.7
"""Two pieces are worth it when they are off by less than this share of what one is."""


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


@dataclass(frozen=True, slots=True)
class BothPoint:
    """A measured step of `batch` sequences that attend to `context` tokens each, with `tokens` of a prompt behind its first `start`."""

    batch: int
    context: int
    tokens: int
    start: int
    seconds: float


def fit_decode(points: Sequence[DecodePoint]) -> tuple[DecodeTimes, Residuals]:
    """Raises `ConfigError` for fewer than three points."""
    terms = [(1.0, point.batch * point.context, point.batch) for point in points]
    (constant, context, row), residuals = fit(terms, [point.seconds for point in points])
    return DecodeTimes(constant=constant, context=context, row=row), residuals


def fit_decodes(points: Sequence[DecodePoint]) -> tuple[DecodeTimes, DecodeTimes | None, int, Residuals]:
    """As `fit_decode`, but in two pieces where these are much nearer to what was measured: times of small batches, those of large ones,
    from which batch on these hold, and how far all are off."""
    times, residuals = fit_decode(points)
    best: tuple[DecodeTimes, DecodeTimes | None, int, Residuals] = times, None, 2, residuals
    for border in sorted({point.batch for point in points})[1:] if residuals.worst > NOISE else ():
        pieces = [point for point in points if point.batch < border], [point for point in points if point.batch >= border]
        if min(map(len, pieces)) < LEAST_PIECE:
            continue
        (small, below), (large, above) = map(fit_decode, pieces)
        mean = (below.mean * below.points + above.mean * above.points) / len(points)
        if mean < min(WORTH * residuals.mean, best[3].mean):
            found = Residuals(points=len(points), mean=mean, worst=max(below.worst, above.worst))
            best = small, large, border, found
    return best


def fit_steps(
    prefills: Sequence[PrefillPoint], decodes: Sequence[DecodePoint], both: Sequence[BothPoint]
) -> tuple[StepTimes, Residuals, Residuals]:
    """The times of a worker of one stage, and how far those of prefill and of decode steps are off."""
    prefill, prefill_residuals = fit_prefill(prefills)
    small, large, border, decode_residuals = fit_decodes(decodes)
    times = StepTimes(prefill=prefill, decode=small, decode_large=large, large_from=border)
    if both:
        rest = times.model_copy(update={"both_row": 0.0})
        row, more = line([(each.batch, each.seconds - step_seconds(rest, _work(each))) for each in both])
        times = times.model_copy(update={"both": max(0.0, more), "both_row": max(0.0, row)})
    return times, prefill_residuals, decode_residuals


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and height at 0 of the line of Theil and Sen, which points that were disturbed do not bend; of one point it is level."""
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2)]
    slope = median(slopes) if slopes else 0.0
    return slope, median(y - slope * x for x, y in points)


def _work(each: BothPoint) -> Work:
    pairs = each.tokens * (2 * each.start + each.tokens)
    return Work(tokens=each.tokens, pairs=pairs, rows=each.batch, context=each.batch * each.context)


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

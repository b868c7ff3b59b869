"""A load as values: what is asked when. Files of lengths and of traces are read from their text here."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from ...core.errors import ConfigError
from ...core.value import value
from .lengths import Pair


@value
class Arrival:
    """One request to send. `at`: seconds from the load's begin. `variant`: of the load; another one has other prompts.

    The first `prefix_tokens` of the prompt are those of every other request with this `prefix` and `tenant`.
    """

    number: int
    at: float
    prompt_tokens: int
    output_tokens: int
    variant: int = 0
    tenant: str = ""
    prefix: int = 0
    prefix_tokens: int = 0


def arrivals_of(times: Iterable[float], pairs: Iterable[Pair], variant: int = 0) -> Iterator[Arrival]:
    """Requests numbered from 0 in the order of their times."""
    for number, (at, (prompt_tokens, output_tokens)) in enumerate(zip(times, pairs, strict=False)):
        yield Arrival(number, at, prompt_tokens, output_tokens, variant)


def limited(arrivals: Iterable[Arrival], requests: int | None, seconds: float | None) -> Iterator[Arrival]:
    """At most so many requests, and none at or after `seconds`."""
    for arrival in islice(arrivals, requests):
        if seconds is not None and arrival.at >= seconds:
            return
        yield arrival


def read_pairs(text: str, name: str) -> list[Pair]:
    """Pairs of prompt and output tokens from a file's text: JSON (a list, or an object whose `pairs` is one) or CSV.

    `name`: the file's, for the `ConfigError` that says which line is wrong.
    """
    return [_pair(row, f"{name}, entry {number}") for number, row in enumerate(_rows(text, name, "pairs", _PAIR_COLUMNS), 1)]


def read_trace(text: str, name: str) -> list[tuple[float, Pair | None]]:
    """Times in seconds, from a file's text; with lengths where a row has three columns (seconds, prompt, output tokens).

    JSON or CSV as `read_pairs`; the first request is moved to second 0. Raises `ConfigError` for what is no such row, and for
    times that run backwards.
    """
    rows = _rows(text, name, "trace", _TRACE_COLUMNS)
    moments = [_moment(row, f"{name}, entry {number}") for number, row in enumerate(rows, 1)]
    times = [at for at, _ in moments]
    if times != sorted(times):
        raise ConfigError(f"{name}: the times run backwards; sort the rows by their first column.", field="trace")
    return [(at - times[0], pair) for at, pair in moments]


_PAIR_COLUMNS = (2,)
_TRACE_COLUMNS = (1, 3)


def _rows(text: str, name: str, key: str, columns: Sequence[int]) -> list[list[Any]]:
    rows = _json_rows(text, name, key) if text.lstrip()[:1] in ("[", "{") else _csv_rows(text)
    if not rows:
        raise ConfigError(f"{name} has no rows.", field=key)
    wanted = " or ".join(map(str, columns))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) not in columns:
            raise ConfigError(f"{name}, entry {number}: {row!r} should have {wanted} columns.", field=key)
    return rows


def _json_rows(text: str, name: str, key: str) -> list[Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name} is not valid JSON: {error}.", field=key) from None
    rows = values.get(key) if isinstance(values, dict) else values
    if not isinstance(rows, list):
        raise ConfigError(f"{name} has no list {key!r}.", field=key)
    return [[row] if isinstance(row, int | float) else row for row in rows]


def _csv_rows(text: str) -> list[list[str]]:
    """Rows of a CSV text, without a heading: a first row whose first cell is no number."""
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    return rows[1:] if rows and _number(rows[0][0], float) is None else rows


def _pair(row: Sequence[Any], where: str) -> Pair:
    prompt, output = (_number(cell, int) for cell in row)
    if prompt is None or output is None or prompt < 1 or output < 1:
        raise ConfigError(f"{where}: {row!r} should be two numbers of tokens, each at least 1.", field="pairs")
    return int(prompt), int(output)


def _moment(row: Sequence[Any], where: str) -> tuple[float, Pair | None]:
    at = _number(row[0], float)
    if at is None or at < 0 or at == float("inf"):
        raise ConfigError(f"{where}: {row[0]!r} is no time in seconds.", field="trace")
    return float(at), _pair(row[1:], where) if len(row) == 3 else None


def _number(cell: Any, kind: Callable[[Any], float]) -> float | None:
    """The cell as that kind of number; None if it is none (a bool, a fraction where a whole number is wanted, nan)."""
    try:
        value = kind(cell)
    except (TypeError, ValueError, OverflowError):
        return None
    if isinstance(cell, bool) or value != value or (not isinstance(cell, str) and value != cell):
        return None
    return value

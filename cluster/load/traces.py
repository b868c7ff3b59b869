"""Recorded workloads, read line by line: our own CSV and JSONL, and the formats of BurstGPT and of Azure's LLM traces. Pure.

    ours       arrival_s,prompt_tokens,output_tokens[,tenant,prefix,prefix_tokens]     or JSONL with these keys
    BurstGPT   Timestamp,…,Request tokens,Response tokens,…                            (Wang et al., 2024)
    Azure      TIMESTAMP,ContextTokens,GeneratedTokens                                 (Patel et al., Splitwise, 2024)

Theirs are moved so that the first request comes at second 0.
"""

from __future__ import annotations

import calendar
import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ...core.errors import ConfigError
from .workload import Arrival

_DATE = re.compile(r"^(\d{4})-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d(?:\.\d+)?)(?:Z|\+00:00)?$")


@dataclass(frozen=True, slots=True)
class _Format:
    """The names of the columns; `shifted`: times are not from the load's begin."""

    at: str
    prompt: str
    output: str
    shifted: bool


_FORMATS = (
    _Format("arrival_s", "prompt_tokens", "output_tokens", shifted=False),
    _Format("timestamp", "request tokens", "response tokens", shifted=True),
    _Format("timestamp", "contexttokens", "generatedtokens", shifted=True),
)


MOST_TOKENS = 10**9
"""Of a prompt or an answer: more is an error of the file."""


def read_arrivals(lines: Iterable[str], name: str, failed: Callable[[int], None] = lambda line: None) -> Iterator[Arrival]:
    """The requests of a file by its lines, as they are read: a trace of any length takes no memory.

    `failed`: told the line of each row without an answer, which BurstGPT has for calls that failed; they are left out.
    `name`: the file's. Raises `ConfigError` with name, line and reason: no rows, no such columns, a time or a length that is none or
    negative, times that run backwards.
    """
    first, number = 0.0, 0
    before = -math.inf
    for line, form, row in _rows(lines, name):
        where = f"{name}, line {line}"
        if form.shifted and str(row.get(form.output)).strip() == "0":
            failed(line)
            continue
        at = _seconds(row.get(form.at), where, form.at)
        if not number and form.shifted:
            first = at
        at -= first
        if at < 0 and number == 0:
            raise _wrong(where, f"{form.at} is {at:g}: a request cannot come before the load begins")
        if at < before:
            raise _wrong(where, f"{form.at} goes back from {before + first:g} to {at + first:g}; sort the rows by it")
        before = at
        yield _arrival(number, at, form, row, where)
        number += 1
    if not number:
        raise ConfigError(f"{name} has no requests.", field="workload")


def _rows(lines: Iterable[str], name: str) -> Iterator[tuple[int, _Format, Mapping[str, Any]]]:
    """Line number, format and cells by column name, in lower case."""
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    head = next(numbered, None)
    if head is None:
        return
    if head[1].lstrip().startswith("{"):
        for number, line in chain([head], numbered):
            yield number, _FORMATS[0], _object(line, f"{name}, line {number}")
        return
    columns = [cell.strip().lower() for cell in next(csv.reader([head[1].lstrip("\ufeff")]))]
    form = next((form for form in _FORMATS if {form.at, form.prompt, form.output} <= set(columns)), None)
    if form is None:
        raise _wrong(f"{name}, line {head[0]}", f"columns are {', '.join(columns)}; there should be arrival_s,prompt_tokens,output_tokens")
    if twice := next((column for column in columns if columns.count(column) > 1), None):
        raise _wrong(f"{name}, line {head[0]}", f"two columns are called {twice}")
    for number, line in numbered:
        cells = next(csv.reader([line]))
        if len(cells) != len(columns):
            raise _wrong(f"{name}, line {number}", f"{len(cells)} cells under {len(columns)} columns")
        yield number, form, dict(zip(columns, cells, strict=True))


def _object(line: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise _wrong(where, f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _wrong(where, "not an object with arrival_s, prompt_tokens and output_tokens")
    return value


def _arrival(number: int, at: float, form: _Format, row: Mapping[str, Any], where: str) -> Arrival:
    prompt, output = _tokens(row.get(form.prompt), where, form.prompt), _tokens(row.get(form.output), where, form.output)
    if form.shifted:
        return Arrival(number, at, prompt, output)
    prefix_tokens = _tokens(row.get("prefix_tokens") or 0, where, "prefix_tokens", least=0)
    if prefix_tokens > prompt:
        raise _wrong(where, f"prefix_tokens is {prefix_tokens}, more than the prompt's {prompt}")
    prefix = _tokens(row.get("prefix") or 0, where, "prefix", least=0)
    return Arrival(number, at, prompt, output, tenant=str(row.get("tenant") or ""), prefix=prefix, prefix_tokens=prefix_tokens)


def _tokens(cell: Any, where: str, column: str, least: int = 1) -> int:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        raise _wrong(where, f"{column} is {cell!r}, not a number") from None
    if value > MOST_TOKENS:
        raise _wrong(where, f"{column} is {cell}; the most is {MOST_TOKENS:,} tokens")
    if isinstance(cell, bool) or not value.is_integer() or value < least:
        failed = " (a call that failed: leave it out)" if value == 0 else ""
        raise _wrong(where, f"{column} is {cell}; it must be a whole number, at least {least}{failed}")
    return int(value)


def _seconds(cell: Any, where: str, column: str) -> float:
    """A number, or a date in UTC."""
    if isinstance(cell, str) and (date := _DATE.match(cell.strip())):
        year, month, day, hour, minute, second = date.groups()
        return calendar.timegm((int(year), int(month), int(day), int(hour), int(minute), 0)) + float(second)
    try:
        value = float(cell)
    except (TypeError, ValueError):
        raise _wrong(where, f"{column} is {cell!r}, not a time in seconds") from None
    if isinstance(cell, bool) or not math.isfinite(value):
        raise _wrong(where, f"{column} is {cell}, not a time in seconds")
    return value


def _wrong(where: str, why: str) -> ConfigError:
    return ConfigError(f"{where}: {why}.", field="workload")

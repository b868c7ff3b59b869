"""Spans added up and laid out: a step's lines are the step, and a trace is one that viewers can nest."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from diptych.cluster.spans.shares import REST, shares_of
from diptych.cluster.spans.table import show_shares
from diptych.cluster.spans.taken import Process, nested
from diptych.cluster.spans.trace import trace_of
from diptych.core.recordings import Doing, Recorded, Span, ThreadTime
from rich.console import Console

ENGINE, LOOP, ROUTER = 1, 2, 3
MS = 1_000_000


def process(spans: list[Span], *, name: str = "decode-0", phase: str = "decode", ahead: int = 0, unsure: int = 0) -> Process:
    ended = max((span.ended for span in spans), default=0)
    threads = (ThreadTime(ENGINE, "engine", 8 * MS, 2 * MS), ThreadTime(LOOP, "engine-loop", MS, 0), ThreadTime(99, "grpc", 10, 0))
    return Process(name, phase, 7, ahead, unsure, Recorded(ahead, ended, tuple(spans), threads))


def step(number: int, at: int, *, wait: int, inputs: int, model: int, sampling: int, rest: int, idle: int = 0) -> list[Span]:
    """Of the engine's thread, ms; `idle` or `wait` before it."""
    began = (at + idle + wait) * MS
    mid = began + inputs * MS
    last = mid + model * MS
    ended = last + (sampling + rest) * MS
    return [
        *([Span(Doing.IDLE, ENGINE, at * MS, (at + idle) * MS, 0)] if idle else []),
        *([Span(Doing.WAIT, ENGINE, at * MS, began, 0)] if wait else []),
        Span(Doing.INPUTS, ENGINE, began, mid, inputs * MS, number),
        Span(Doing.FORWARD, ENGINE, mid, last, model * MS, number),
        Span(Doing.SAMPLE, ENGINE, last, last + sampling * MS, sampling * MS, number),
        Span(Doing.STEP, ENGINE, began, ended, (ended - began) // 2, number, ("an attempt",)),
    ]


def test_a_step_is_the_sum_of_its_lines_and_idleness_is_none_of_it() -> None:
    spans = [
        *step(0, 0, idle=500, wait=0, inputs=1, model=20, sampling=2, rest=1),
        *step(1, 524, wait=3, inputs=1, model=22, sampling=2, rest=2),
        *[Span(Doing.TURN, LOOP, 530 * MS, 534 * MS, 3 * MS), Span(Doing.DECIDE, LOOP, 531 * MS, 532 * MS, MS)],
    ]
    shares = shares_of(process(spans))
    assert (shares.per, shares.count) == ("step", 2)
    assert shares.steps is not None
    found = {line.name: line for line in shares.steps.lines}
    assert {name: round(1e3 * line.each.mean, 6) for name, line in found.items()} == {
        Doing.WAIT: 1.5,
        Doing.INPUTS: 1.0,
        Doing.FORWARD: 21.0,
        Doing.SAMPLE: 2.0,
        REST: 1.5,
    }
    assert shares.steps.each.mean == pytest.approx(0.027)
    assert sum(line.each.mean for line in shares.steps.lines) == pytest.approx(shares.steps.each.mean)
    assert shares.steps.outside == pytest.approx(1 - 21 / 27)
    assert found[Doing.FORWARD].each.max == pytest.approx(0.022)
    turn, decide = shares.beside
    assert (turn.thread, turn.name, turn.count, turn.each.mean, turn.per_step) == ("engine-loop", Doing.TURN, 1, 0.003, 0.0015)
    assert (decide.name, decide.on_core) == (Doing.DECIDE, 0.0005)
    engine, more = shares.cores
    assert (engine.thread, engine.ran, engine.ready) == ("engine", 0.004, 0.001)
    assert (more.thread, more.ran) == ("2 more", pytest.approx(0.0005, rel=1e-3)), "each had less than 0.5 % of a core"


def test_a_step_that_is_launched_lasts_as_long_as_one_is_under_way() -> None:
    """On a GPU: 20 ms from one step to the next, of which for 18 the host has nothing to ask of it."""
    launched = [span for number in range(3) for span in step(number, 20 * number + 18, wait=0, inputs=0, model=1, sampling=1, rest=0)]
    spans = [*(Span(Doing.UNDER_WAY, ENGINE, 20 * at * MS, (20 * at + 18) * MS, 0) for at in range(3)), *launched]
    steps = shares_of(process(spans)).steps
    assert steps is not None
    assert steps.each.mean == pytest.approx(0.020)
    assert {line.name: line.each.mean for line in steps.lines if line.each.mean} == pytest.approx(
        {Doing.UNDER_WAY: 0.018, Doing.FORWARD: 0.001, Doing.SAMPLE: 0.001}
    )
    assert steps.outside == pytest.approx(0.05)


def test_any_nesting_adds_up() -> None:
    """Random spans of an engine's thread, with whatever may lie in one another."""
    rng = random.Random(3)
    clock = count()

    def inside(depth: int) -> Iterator[Span]:
        for _ in range(rng.randrange(3) if depth else 0):
            began = next(clock)
            doing = rng.choice([Doing.INPUTS, Doing.FORWARD, Doing.ANNOUNCE, Doing.COLLECT, Doing.SAMPLE, Doing.COMPLETE])
            within = list(inside(depth - 1))
            yield from within
            yield Span(doing, ENGINE, began, next(clock), 0, 0)

    spans: list[Span] = []
    for number in range(40):
        waited = next(clock)
        if rng.random() < 0.7:
            spans.append(Span(rng.choice([Doing.WAIT, Doing.IDLE]), ENGINE, waited, next(clock), 0))
        began = next(clock)
        spans += inside(3)
        spans.append(Span(Doing.STEP, ENGINE, began, next(clock), 0, number))
    steps = shares_of(process(spans)).steps
    assert steps is not None
    assert steps.each.count == 40
    assert sum(line.each.mean for line in steps.lines) == pytest.approx(steps.each.mean)
    assert all(line.each.mean >= 0 for line in steps.lines)
    nests(trace_of([process(spans)]))


def test_a_router_is_counted_by_its_messages() -> None:
    spans = [Span(Doing.RECEIVE, ROUTER, at * MS, (at + 2) * MS, MS) for at in (0, 10, 20, 30)]
    spans += [Span(Doing.EMIT, ROUTER, at * MS, (at + 1) * MS, MS, -1, ("r",)) for at in (0, 10, 20, 30)]
    shares = shares_of(process(spans, name="router", phase="router"))
    assert (shares.per, shares.count, shares.steps) == ("message", 4, None)
    assert {line.name: line.per_step for line in shares.beside} == {Doing.RECEIVE: 0.001, Doing.EMIT: 0.001}


def test_nothing_recorded_is_shown_too() -> None:
    shares = shares_of(process([]))
    console = Console(width=200, record=True, file=io.StringIO())
    show_shares(console, [shares])
    assert "decode-0: 0 messages" in console.export_text()


def test_the_table_says_where_the_time_goes() -> None:
    console = Console(width=40, record=True, file=io.StringIO(), soft_wrap=True)
    spans = [span for number in range(9) for span in step(number, 30 * number, wait=1, inputs=1, model=21, sampling=2, rest=1)]
    show_shares(console, [shares_of(process(spans, unsure=MS))])
    text = console.export_text()
    assert "outside the model: 19.2% of a step" in text
    row = next(line for line in text.splitlines() if line.startswith("model"))
    assert row.split() == ["model", "9", "21.000", "21.000", "21.000", "21.000", "80.8%", "21.000"]
    assert "aligned to 1.00 ms" in text


def test_spans_of_a_thread_that_overlap_are_a_defect() -> None:
    with pytest.raises(ValueError, match="overlap"):
        nested((Span(Doing.WRITE, 1, 0, 10, 0), Span(Doing.WRITE, 1, 5, 15, 0)))


def test_a_trace_has_processes_threads_and_nested_events_on_one_clock() -> None:
    near = [*step(0, 100, idle=9, wait=0, inputs=1, model=20, sampling=2, rest=1), Span(Doing.TURN, LOOP, 105 * MS, 106 * MS, MS)]
    far = process([Span(Doing.RECEIVE, ROUTER, 1130 * MS, 1131 * MS, MS, -1, ("r-1",))], name="router", ahead=1000 * MS, unsure=MS)
    document = json.loads(json.dumps(trace_of([process(near), far])))
    nests(document)
    named = {(event["pid"], event["tid"]): event["args"]["name"] for event in document["traceEvents"] if event["name"] == "thread_name"}
    assert named == {(1, ENGINE): "engine", (1, LOOP): "engine-loop"}
    received = next(event for event in document["traceEvents"] if event["name"] == Doing.RECEIVE)
    stepped = next(event for event in document["traceEvents"] if event["name"] == Doing.STEP)
    assert received["args"]["who"] == ["r-1"]
    assert (stepped["args"]["step"], stepped["args"]["who"]) == (0, ["an attempt"])
    assert received["ts"] == pytest.approx(130_000)
    assert stepped["ts"] == pytest.approx(109_000)
    assert document["otherData"]["clocks"].startswith("aligned to 1.00 ms")


def nests(document: dict[str, Any]) -> None:
    """The format's complete events: times that are not negative, and of a thread each within another or apart from it."""
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in document["traceEvents"]:
        assert event["ph"] in ("M", "X")
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            threads.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for events in threads.values():
        events.sort(key=lambda event: (event[0], -event[1]))
        around: list[tuple[float, float]] = []
        for began, ended in events:
            while around and around[-1][1] <= began + 1e-4:  # us: a tenth of a ns, for the sum of two floats
                around.pop()
            assert not around or ended <= around[-1][1] + 1e-4
            around.append((began, ended))


def test_what_looks_for_nesting_finds_what_does_not_nest() -> None:
    events = [{"ph": "X", "pid": 1, "tid": 1, "ts": ts, "dur": 10.0} for ts in (0.0, 5.0)]
    with pytest.raises(AssertionError):
        nests({"traceEvents": events})
    events[1]["dur"] = 3.0
    nests({"traceEvents": events})

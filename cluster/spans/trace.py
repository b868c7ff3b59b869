"""Recordings as a trace of Chrome's format (JSON), which ui.perfetto.dev and chrome://tracing open. Pure.

The format: "Trace Event Format", Nestler, Duca et al., https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU;
times are microseconds. Processes are the cluster's, threads theirs; a complete event ("X") for each span.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .taken import Process

Event = dict[str, Any]


def trace_of(processes: Sequence[Process]) -> dict[str, Any]:
    """The whole document. Time 0 is when the first process began to be recorded."""
    began = min((process.recorded.began - process.ahead for process in processes), default=0)
    events = [event for number, process in enumerate(processes, 1) for event in _events(process, number, began)]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"clocks": clocks(processes)}}


def clocks(processes: Iterable[Process]) -> str:
    """How well what happened in several processes can be compared."""
    unsure = max((process.unsure for process in processes), default=0)
    return f"aligned to {unsure / 1e6:.2f} ms (several hosts)" if unsure else "one clock (one host)"


def _events(process: Process, number: int, began: int) -> Iterator[Event]:
    yield _named("process_name", number, 0, f"{process.name} ({process.pid})")
    yield {"ph": "M", "name": "process_sort_index", "pid": number, "tid": 0, "args": {"sort_index": number}}
    seen = {span.thread for span in process.recorded.spans}
    for thread in process.recorded.threads:
        if thread.thread in seen:
            yield _named("thread_name", number, thread.thread, thread.name)
    for span in process.recorded.spans:
        event: Event = {
            "ph": "X",
            "name": span.doing.value,
            "cat": process.phase,
            "pid": number,
            "tid": span.thread,
            "ts": (span.began - process.ahead - began) / 1e3,
            "dur": (span.ended - span.began) / 1e3,
        }
        arguments: Event = {"on core, us": span.on_core / 1e3}
        if span.step >= 0:
            arguments["step"] = span.step
        if span.who:
            arguments["who"] = list(span.who)
        yield {**event, "args": arguments}


def _named(what: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}

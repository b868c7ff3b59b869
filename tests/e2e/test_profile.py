"""`diptych bench --profile` over real workers and a router: what each did in its steps, as tables and as a trace."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from diptych.cluster.commands.benching import Bench, Profiled
from diptych.cluster.load.choice import Load
from diptych.cluster.spans.collect import recording
from diptych.cluster.spans.shares import shares_of
from diptych.cluster.spans.taken import nested
from diptych.core.fleet import LocalPrefill
from diptych.core.recordings import Doing
from diptych.core.spans import span
from diptych.rpc.spans import SpansClient
from e2e_harness import Family
from router_harness import router

OUTPUT = 6


def test_a_bench_is_recorded_at_the_router_and_at_every_worker(
    gemma3_ranks: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace.json"

    async def scenario() -> None:
        async with router([gemma3_ranks.prefills[0], gemma3_ranks.decode], LocalPrefill.NEVER) as running:
            settings = {"model": None, "api_key": None, "vocabulary": 100, "seed": 1, "timeout_s": 30.0, "as_text": False, "ca": None}
            load = Load(input="40", output=str(OUTPUT))
            profiled = Profiled(file, 30.0, running.control, None)
            bench = Bench(f"http://{running.http}", settings, load, 20.0, 0, None, None, profiled)
            assert await bench.once(None, requests=4, seconds=None)

    asyncio.run(scenario())
    assert span(Doing.STEP) is span(Doing.STEP), "nothing is recorded any more"
    shown = capsys.readouterr().out
    for part in ("p0", "d0", "router", Doing.FORWARD, Doing.SAMPLE, "outside the model", "waited for one", file.name):
        assert part in shown
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["args"]["name"].split()[0]: event["pid"] for event in events if event["name"] == "process_name"}
    assert set(names) == {"router", "p0", "d0"}
    for name, some in {
        "p0": (Doing.STEP, Doing.INPUTS, Doing.FORWARD, Doing.SAMPLE, Doing.ANNOUNCE, Doing.DECIDE, Doing.COMPLETE, Doing.TRANSFER),
        "d0": (Doing.STEP, Doing.FORWARD, Doing.SAMPLE, Doing.COMPLETE, Doing.REPORT, Doing.DELIVER, Doing.ENCODE, Doing.COPY),
        "router": (Doing.COMMAND, Doing.DECODE, Doing.RECEIVE, Doing.EMIT, Doing.DETOKENISE, Doing.FORMAT, Doing.WRITE),
    }.items():
        assert set(some) <= {event["name"] for event in events if event["pid"] == names[name]}, name
    decoded = [event for event in events if event["pid"] == names["d0"] and event["name"] == Doing.STEP]
    assert len(decoded) >= OUTPUT - 1
    commanded = [event["args"]["who"] for event in events if event["pid"] == names["router"] and event["name"] == Doing.COMMAND]
    requests = {attempt: request for request, attempt in commanded}
    assert len({requests[attempt] for event in decoded for attempt in event["args"]["who"]}) == 4, "an attempt's request is known"


def test_a_worker_tells_its_steps_and_they_add_up(gemma3_ranks: Family) -> None:
    async def scenario() -> None:
        async with router([gemma3_ranks.prefills[0], gemma3_ranks.decode], LocalPrefill.ALWAYS) as running:
            async with recording(running.control, None, 30.0) as collection:
                again = SpansClient(gemma3_ranks.decode.address)
                with pytest.raises(Exception, match="recorded already"):
                    await again.begin(1.0, 1)
                await again.close()
                settings = {"model": None, "api_key": None, "vocabulary": 100, "seed": 1, "timeout_s": 30.0, "as_text": False, "ca": None}
                bench = Bench(f"http://{running.http}", settings, Load(input="40", output=str(OUTPUT)), 20.0, 0, None, None)
                assert await bench.once(None, requests=2, seconds=None)
            decode = next(process for process in collection.processes if process.name == "d0")
            for nodes in nested(decode.recorded.spans).values():
                for node in (node for outer in nodes for node in outer.all()):
                    assert decode.recorded.began <= node.span.began <= node.span.ended
                    assert all(node.span.began <= each.span.began <= each.span.ended <= node.span.ended for each in node.within)
            steps = shares_of(decode).steps
            assert steps is not None
            assert sum(line.each.mean for line in steps.lines) == pytest.approx(steps.each.mean)

    asyncio.run(scenario())

"""`diptych bench` against a server that writes down what it did: times, errors, dialects, the search, the files, Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from diptych.cluster.cli import app
from diptych.cluster.load import server as server_module
from diptych.cluster.load.answer import Wire
from diptych.cluster.load.choice import Load
from diptych.cluster.load.dialect import Dialect
from diptych.cluster.load.goodput import Probe, Search, Trial
from diptych.cluster.load.measure import Run, measure
from diptych.cluster.load.probing import Prober
from diptych.cluster.load.server import Server, find_server
from diptych.cluster.load.slo import Slo
from diptych.core.errors import ConfigError, Unavailable
from scripted_server import Script, ScriptedServer, Served, serving
from typer.testing import CliRunner


async def find(url: str, *, as_text: bool = False, timeout_s: float = 30.0) -> Server:
    return await find_server(url, model=None, api_key="k", vocabulary=500, seed=1, timeout_s=timeout_s, as_text=as_text)


def run(script: Script, requests: int, rate: float = 100.0, output: str = "4", **options: Any) -> tuple[Run, ScriptedServer]:
    """A load on a scripted server in this process, whose clock is the client's."""

    async def both() -> tuple[Run, ScriptedServer]:
        async with serving(script) as scripted:
            server = await find(scripted.url, **options)
            scripted.served.clear()
            arrivals = islice(Load(input="8", output=output).arrivals(rate), requests)
            return await measure(server, arrivals, asyncio.Event(), lambda run: None), scripted

    return asyncio.run(both())


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, ...], Wire]:
    """What passed over each connection, by its prompt: times on the clock that the scripted server uses too."""
    kept: dict[tuple[int, ...], Wire] = {}
    real = server_module.exchange

    async def keeping(endpoint: Any, method: str, path: str, body: bytes, timeout_s: float) -> Wire:
        wire = await real(endpoint, method, path, body, timeout_s)
        if method == "POST":
            kept[tuple(json.loads(body)["prompt"])] = wire
        return wire

    monkeypatch.setattr(server_module, "exchange", keeping)
    return kept


def seen_of(served: Served, wires: dict[tuple[int, ...], Wire]) -> tuple[Wire, list[float]]:
    """A request's wire, and when each of its events with tokens had come."""
    wire = wires[tuple(served.body["prompt"])]
    return wire, [at for at, data in wire.events if b'"text"' in data]


def test_times_are_those_at_which_the_server_sent(wires: dict[tuple[int, ...], Wire]) -> None:
    """Each event's time lies between its sending and the next one's, however slow this machine is."""
    script = Script(events=lambda number: [(0.01 * (number % 3), 1), (0.05, 1), (0.01, 1), (0.03, 3), (0.02, 1)])
    done, scripted = run(script, 12, rate=50.0, output="7")
    assert len(done.answers) == len(scripted.served) == 12
    for served in scripted.served:
        wire, seen = seen_of(served, wires)
        assert wire.connected is not None
        assert wire.begun <= wire.connected <= served.accepted
        assert all(sent <= came for sent, came in zip(served.sent, seen, strict=True))
        assert all(came <= following for came, following in zip(seen, served.sent[1:], strict=False))
    for answer in done.answers:
        assert answer.error is None
        assert (len(answer.token_times), answer.events, answer.shared_events) == (7, 5, 1)
        assert answer.token_times[3] == answer.token_times[4] == answer.token_times[5]
        assert answer.lag >= 0
        assert answer.server_ttft is not None
        assert answer.ttft is not None
        assert answer.server_ttft <= answer.ttft


def test_the_load_is_open_loop() -> None:
    """Requests are sent though no earlier one is answered: the first is not before the last has come."""

    async def check() -> Run:
        async with serving(Script(events=lambda number: [(0.0, 1)] * 2)) as scripted:
            server = await find(scripted.url)
            scripted.served.clear()
            scripted.script.first_waits_for = 10
            return await measure(server, islice(Load(output="2").arrivals(200.0), 10), asyncio.Event(), lambda run: None)

    done = asyncio.run(check())
    assert [answer.error for answer in done.answers] == [None] * 10
    by_number = sorted(done.answers, key=lambda answer: answer.arrival.number)
    assert all(early.sent <= late.sent for early, late in pairwise(by_number))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"cut_after": 2}, "connection lost"),
        ({"error_after": 1}, "error event: unavailable"),
        ({"status": 429}, "HTTP 429: overloaded"),
        ({"events": lambda number: [(0.0, 1)] * 3}, "fewer tokens than asked for"),
        ({"events": lambda number: [(60.0, 1)]}, "timeout"),
    ],
)
def test_errors_are_told_apart(change: dict[str, Any], kind: str) -> None:
    async def check() -> None:
        async with serving(Script()) as scripted:
            server = await find(scripted.url)
            if kind == "timeout":
                server = replace(server, timeout_s=0.3)
            for name, value in change.items():
                setattr(scripted.script, name, value)
            done = await measure(server, islice(Load(output="4").arrivals(100.0), 3), asyncio.Event(), lambda run: None)
            assert {answer.error for answer in done.answers} == {kind}

    asyncio.run(check())


@pytest.mark.parametrize(
    ("refuses", "left"),
    [
        ((), Dialect()),
        (("continuous_usage_stats",), Dialect(running_usage=False)),
        (("ignore_eos",), Dialect(ignore_eos=False)),
        (("ids", "continuous_usage_stats"), Dialect(token_ids=False, running_usage=False)),
        (("stream_options", "ignore_eos", "ids"), Dialect(False, False, False, False)),
    ],
)
def test_a_server_is_asked_as_it_wants(refuses: tuple[str, ...], left: Dialect) -> None:
    script = Script(refuses=frozenset(refuses), usage="every" if left.running_usage else "last" if left.usage else "never")
    done, scripted = run(script, 2)
    assert [answer.error for answer in done.answers] == [None, None]
    assert all(isinstance(served.body["prompt"], list) == left.token_ids for served in scripted.served)
    assert all(served.body.get("ignore_eos", False) == left.ignore_eos for served in scripted.served)
    assert {answer.output_tokens for answer in done.answers} == {4}


def test_words_are_sent_if_asked_for() -> None:
    _, scripted = run(Script(), 1, as_text=True)
    assert len(scripted.served[0].body["prompt"].split()) == 8


def test_a_server_that_takes_nothing_is_told_with_its_own_words() -> None:
    async def check() -> None:
        async with serving(Script(status=503)) as scripted:
            with pytest.raises(ConfigError, match=r"HTTP 503\): No\."):
                await find(scripted.url)
        async with serving(Script(refuses=frozenset({"max_tokens"}))) as scripted:
            with pytest.raises(ConfigError, match="max_tokens: unknown field"):
                await find(scripted.url)
        with pytest.raises(Unavailable, match="cannot connect"):
            await find("127.0.0.1:9")
        with pytest.raises(ConfigError, match="no address"):
            await find("ftp://x")

    asyncio.run(check())


def test_a_load_that_is_stopped_keeps_what_there_is_and_leaves_nothing() -> None:
    async def check() -> None:
        # The first look and the first two requests are answered, the rest never.
        script = Script(events=lambda number: [(0.0 if number < 3 else 60.0, 1)] * 4)
        async with serving(script) as scripted:
            server, stop = await find(scripted.url), asyncio.Event()

            def watch(run: Run) -> None:
                if run.sent >= 6 and len(run.answers) == 2:
                    stop.set()

            done = await measure(server, Load(output="4").arrivals(200.0), stop, watch)
            assert len(done.answers) == 2
            assert done.unfinished >= 4
            assert done.sent == done.unfinished + 2
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(check())


class Capacity:
    """A server of one queue that answers a request every 1 / `capacity` seconds: it meets any SLO below that rate, and none above."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity

    def prepare(self, arrival: Any) -> bytes:
        return b""

    async def ask(self, arrival: Any, body: bytes, begin: float) -> Any:
        from diptych.cluster.load.answer import Answer, Counting

        await asyncio.sleep(0)
        behind = arrival.number * (1 / self.capacity) - arrival.at
        times = (0.01 + max(0.0, behind), 0.02 + max(0.0, behind))
        return Answer(arrival, arrival.at, 0.0, times[1], times, 2, 8, 2, 0, Counting.USAGE, None)


def test_the_search_finds_the_capacity_of_a_queue() -> None:
    """Arrivals are constant and answers immediate, so the whole search takes as long as its sending: some 60 requests a probe."""
    search, seen = Search(0.9, 500.0, tolerance=0.2), list[Probe]()

    async def check() -> Any:
        load = Load(output="2", constant=True)
        prober = Prober(Capacity(1500.0), load.arrivals, Slo(ttft=0.0101), Trial.growing(0.9, 0.95, 120), 3, seen.append)
        return await prober.search(search, asyncio.Event(), 60.0)

    found = asyncio.run(check())
    assert found.complete
    assert found.proven <= 1500 < found.refuted
    assert [probe.total for probe in search.probes if probe.rate > 1500] == [30] * sum(probe.rate > 1500 for probe in search.probes)
    assert seen[-1] == search.probes[-1]


def test_a_search_ends_with_its_budget() -> None:
    async def check() -> Any:
        prober = Prober(Capacity(1.0), Load(output="2").arrivals, Slo(ttft=1.0), Trial.growing(0.9, 0.95, 30), 0, lambda probe: None)
        return await prober.search(Search(0.9, 0.5), asyncio.Event(), 0.2)

    found = asyncio.run(asyncio.wait_for(check(), 20))
    assert not found.complete
    assert (found.proven, found.refuted) == (None, None)


@contextmanager
def in_thread(script: Script) -> Iterator[ScriptedServer]:
    """A scripted server beside a command, which has an event loop of its own."""
    ready, up = threading.Event(), dict[str, Any]()

    async def serve() -> None:
        async with serving(script) as scripted:
            up.update(scripted=scripted, loop=asyncio.get_running_loop(), end=asyncio.Event())
            ready.set()
            await up["end"].wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(20)
    try:
        yield up["scripted"]
    finally:
        up["loop"].call_soon_threadsafe(up["end"].set)
        thread.join(20)


def test_the_command_prints_and_keeps_what_it_measured(tmp_path: Path) -> None:
    files = {"json": tmp_path / "out.json", "plot": tmp_path / "out.png"}
    with in_thread(Script(events=lambda number: [(0.002, 1)] * 4)) as scripted:
        line = f"bench {scripted.url} --rate 100 --requests 24 --warm-up 4 --input 4-9 --output 4 --slo ttft=10s,tpot=5s"
        result = CliRunner().invoke(app, [*line.split(), "--json", str(files["json"]), "--plot", str(files["plot"])])
    assert result.exit_code == 0, result.output
    for said in (
        "scripted",
        "TTFT",
        "TPOT",
        "20 requests",
        "behind 4 not counted",
        "20 of 20: 100.0%",
        "µs per event",
        "Client and server",
    ):
        assert said in result.output
    kept = json.loads(files["json"].read_text())
    assert kept["report"]["times"]["itl"]["count"] == 40
    assert len(kept["requests"]) == 24
    assert kept["load"]["input"] == "4-9"
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_the_command_finds_a_goodput(tmp_path: Path) -> None:
    files = [tmp_path / "out.json", tmp_path / "out.png"]
    with in_thread(Script(events=lambda number: [(0.0, 1)] * 2)) as scripted:
        line = f"bench {scripted.url} --goodput --slo ttft=10s --rate 200 --budget 2 --warm-up 2 --output 2 --input 9"
        result = CliRunner().invoke(app, [*line.split(), "--json", str(files[0]), "--plot", str(files[1])])
    assert result.exit_code == 0, result.output
    assert "200.000 requests/s: 60 of 60 met the SLO" in result.output
    prompts = [tuple(served.body["prompt"]) for served in scripted.served]
    assert len(set(prompts)) == len(prompts)  # or a later probe would meet the prefix cache of an earlier one
    assert "at 95% for each rate" in result.output
    assert json.loads(files[0].read_text())["goodput"]["proven"] >= 200
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--goodput"], "needs an --slo"),
        (["--slo", "x"], "--slo 'x'"),
        (["--input", "0"], "input '0'"),
        (["--lengths", "/nowhere"], "cannot be read"),
        (["--json", "/nowhere/x.json"], "no directory"),
        (["--name", "nobody"], "No cluster named 'nobody'"),
    ],
)
def test_what_is_asked_wrongly_is_refused_in_one_line(arguments: list[str], said: str) -> None:
    url = [] if "--name" in arguments else ["http://127.0.0.1:9"]
    result = CliRunner().invoke(app, ["bench", *url, *arguments])
    assert result.exit_code in (1, 2)
    assert said in result.output
    assert "Traceback" not in result.output


def test_ctrl_c_shows_what_there_is() -> None:
    sent: list[int] = []
    enough = threading.Event()

    def events(number: int) -> list[tuple[float, int]]:
        sent.append(number)
        if len(sent) > 12:
            enough.set()
        return [(0.0, 1)] * 4

    with in_thread(Script(events=events)) as scripted, bench_process(scripted.url, "--rate", "20", "--requests", "100000") as process:
        assert enough.wait(60)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    counted = re.search(r"(\d+) requests in", output)
    assert counted
    assert 5 <= int(counted[1]) < 100000


@contextmanager
def bench_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-P", "-m", "diptych.cluster.cli", "bench", "--output", "4", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_bench_help_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'numpy', 'matplotlib', 'h11'}"
    script = (
        "import sys\nfrom diptych.cluster.cli import main\nsys.argv = ['diptych', 'bench', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    "
        f"print({heavy} & sys.modules.keys(), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr.strip() == "set()"

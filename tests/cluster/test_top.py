"""What `diptych top` makes of a router's metrics, and what it says of a server that is none."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from diptych.cluster.load.slo import Slo
from diptych.cluster.programs.exporter import Exporter
from diptych.cluster.top.picture import TPOT, TTFT, picture
from diptych.cluster.top.scraped import NOTHING, Change, Scrape, parse
from diptych.cluster.top.tables import draw
from diptych.cluster.top.watching import _look
from diptych.core.errors import NotFound, Unauthenticated, Unavailable
from http_peer import Handler, serving
from rich.console import Console


def scraped(exporter: Exporter, at: float) -> Scrape:
    return parse(exporter.text().decode(), at)


def test_quantiles_are_prometheus_s() -> None:
    exporter = Exporter("tiny")
    for value in (0.002, 0.002, 0.03, 0.2):  # buckets up to 2.5, 50 and 250 ms
        exporter.observe(TTFT, value)
    change = Change(NOTHING, scraped(exporter, 0.0))
    assert change.quantile(TTFT, 0.5) == pytest.approx(0.0025)
    assert change.quantile(TTFT, 0.75) == pytest.approx(0.05)
    assert change.quantile(TTFT, 1.0) == pytest.approx(0.25)
    assert change.quantile(TPOT, 0.5) is None
    assert change.share_within(TTFT, 0.0025) == pytest.approx(0.5)
    assert change.share_within(TTFT, 0.0375) == pytest.approx(0.625), "half of what lies between 25 and 50 ms"
    assert change.share_within(TTFT, 100.0) == 1.0
    assert change.share_within(TPOT, 1.0) is None


def test_what_lies_beyond_the_last_bound_is_that() -> None:
    exporter = Exporter("tiny")
    exporter.observe(TTFT, 1000.0)
    change = Change(NOTHING, scraped(exporter, 0.0))
    assert change.quantile(TTFT, 0.5) == 60.0
    assert change.share_within(TTFT, 60.0) == 0.0


def test_only_what_is_new_counts() -> None:
    exporter = Exporter("tiny")
    exporter.observe(TTFT, 30.0)
    exporter.inc("vllm:generation_tokens_total", 100)
    before = scraped(exporter, 10.0)
    exporter.observe(TTFT, 0.002)
    exporter.inc("vllm:generation_tokens_total", 50)
    change = Change(before, scraped(exporter, 15.0))
    assert change.quantile(TTFT, 0.99) < 0.0026  # type: ignore[operator]
    assert change.rate("vllm:generation_tokens_total") == 10.0


def test_a_router_that_began_anew_has_no_negative_rates() -> None:
    old, new = Exporter("tiny"), Exporter("tiny")
    old.inc("vllm:generation_tokens_total", 100)
    new.inc("vllm:generation_tokens_total", 20)
    assert Change(scraped(old, 0.0), scraped(new, 10.0)).rate("vllm:generation_tokens_total") == 2.0


def busy() -> Exporter:
    exporter = Exporter("tiny")
    for phase, name in (("decode", "decode-0"), ("prefill", "prefill-0")):
        worker, engine = {"worker": name, "phase": phase}, {"engine": name, "phase": phase}
        exporter.set("diptych_worker_up", float(phase == "prefill"), **worker)
        exporter.set("vllm:num_requests_running", 3, **engine)
        exporter.set("vllm:num_requests_waiting", 2, **engine)
        exporter.set("vllm:kv_cache_usage_perc", 0.97, **engine)
        exporter.set("diptych_worker_grants_waiting", 4, **worker)
        for state, count in (("free", 1), ("cached", 1), ("referenced", 2)):
            exporter.set("diptych_worker_blocks", count, state=state, **worker)
        exporter.inc("diptych_worker_preemptions_total", 5, **worker)
    exporter.inc("diptych_kv_transfer_bytes_total", 2e6, transport="gloo")
    exporter.inc("diptych_requests_total", 7, outcome="overloaded")
    exporter.observe(TTFT, 2.0)
    return exporter


def test_a_picture_of_a_busy_cluster() -> None:
    seen = picture(Change(NOTHING, scraped(busy(), 1.0)), Slo(ttft=1.0))
    assert [worker.name for worker in seen.workers] == ["prefill-0", "decode-0"], "prefill first"
    assert (seen.workers[1].up, seen.workers[1].running, seen.workers[1].waiting, seen.workers[1].grants_waiting) == (False, 3, 2, 4)
    assert seen.workers[0].blocks == {"free": 1, "cached": 1, "referenced": 2}
    assert (seen.ttft.slo, seen.ttft.met, seen.tpot.met) == (1.0, 0.0, None)
    assert seen.ended == {"overloaded": 7}
    assert json.loads(json.dumps(seen.as_json()))["transfers"][0]["bytes"] == 2_000_000
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(draw(seen, "host:1"))
    shown = console.export_text()
    for text in ("gone", "97%", "7 overloaded", "2.0 MB", "(5 preempted)", "1.00 s"):
        assert text in shown, text


@contextmanager
def server(*answers: tuple[int, bytes]) -> Iterator[str]:
    """Gives these answers one after another, then the last again and again."""
    left = list(answers)

    class Peer(Handler):
        def do_GET(self) -> None:
            self.answer(*(left.pop(0) if len(left) > 1 else left[0]))

    with serving(Peer) as address:
        yield address


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((401, b""), Unauthenticated),
        ((500, b""), Unavailable),
        ((200, b"<html>"), Unavailable),
        ((200, b"up 1\n"), NotFound),
    ],
)
def test_a_server_that_does_not_tell(answer: tuple[int, bytes], error: type[Exception]) -> None:
    with server(answer) as address, httpx.Client(base_url=f"http://{address}") as client, pytest.raises(error):
        _look(client)


def test_a_router_that_goes_away_is_waited_for() -> None:
    good = (200, busy().text())
    with server(good, (500, b""), good) as address:
        command = [sys.executable, "-P", "-m", "diptych.cluster.cli", "top", "--server", address, "--json", "--every", "0.1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        finally:
            process.kill()
            process.communicate()
    assert [("error" in line, "workers" in line) for line in lines] == [(False, True), (True, False), (False, True)]

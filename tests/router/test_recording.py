"""What the router remembers of its load: how much, how long, and no word of it."""

from __future__ import annotations

import asyncio
import csv
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from diptych.cluster.load.traces import read_arrivals
from diptych.core.clock import ManualClock
from diptych.core.errors import ConfigError
from diptych.router import recording as recording_module
from diptych.router.recording import COLUMNS, Past, RecordFile, Recording, keep_written
from diptych.rpc.router import RouterClient

PAST = Past(0.0, 100, 16, 5, 0.25, 0.01)


def past(accepted: float, output_tokens: int = 5) -> Past:
    return PAST._replace(accepted=accepted, output_tokens=output_tokens)


def test_a_window_has_what_came_in_it_the_oldest_first_and_what_is_under_way() -> None:
    clock = ManualClock(100.0)
    recording = Recording(clock)
    for accepted in (101.0, 115.0, 112.0):
        recording.ended(past(accepted))
    clock.advance(20.0)
    window = recording.window(10.0, [past(113.0, 2)])
    assert window.seconds == 10.0
    assert [(each.age, each.output_tokens, each.ended) for each in window.requests] == [(8.0, 5, True), (7.0, 2, False), (5.0, 5, True)]
    assert recording.window(60.0, []).seconds == 20.0, "it began then"


def test_it_is_bounded_and_says_how_far_back_it_is_whole() -> None:
    clock = ManualClock()
    recording = Recording(clock, kept=3)
    for accepted in (1.0, 4.0, 2.0, 6.0, 7.0):
        clock.advance(2.0)
        recording.ended(past(accepted))
    window = recording.window(100.0, [])
    assert window.seconds == pytest.approx(6.0), "what came until second 4 may have been forgotten"
    assert [10.0 - each.age for each in window.requests] == [6.0, 7.0]


def test_what_got_no_token_is_no_load() -> None:
    recording = Recording(ManualClock())
    recording.ended(past(1.0, 0))
    assert recording.window(9.0, []).requests == ()
    assert recording.take() == []


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_the_file_is_in_the_order_of_arrival_and_the_simulator_reads_it(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "W.csv", 1 << 20)
    file.write([past(12.0), past(10.5)], oldest=11.0)
    assert [row["arrival_s"] for row in rows(tmp_path / "W.csv")] == ["0.0000"], "one that came before 12 has not ended"
    file.write([past(11.0), past(13.0)._replace(ttft=None, tpot=None, cached_tokens=0)], oldest=None)
    file.close()
    assert (tmp_path / "W.csv").read_text().splitlines()[0] == COLUMNS
    assert [row["arrival_s"] for row in rows(tmp_path / "W.csv")] == ["0.0000", "0.5000", "1.5000", "2.5000"]
    assert [row["ttft_s"] for row in rows(tmp_path / "W.csv")] == ["0.25000"] * 3 + [""]
    with (tmp_path / "W.csv").open() as lines:
        arrivals = list(read_arrivals(lines, "W.csv"))
    assert [(each.prompt_tokens, each.output_tokens, each.prefix_tokens) for each in arrivals] == [(100, 5, 16)] * 3 + [(100, 5, 0)]


def test_one_that_comes_late_does_not_make_time_run_backwards(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "W.csv", 1 << 20)
    file.write([past(12.0)], oldest=None)
    file.write([past(11.0), past(13.0)], oldest=None)
    file.close()
    with (tmp_path / "W.csv").open() as lines:
        assert [each.at for each in read_arrivals(lines, "W.csv")] == [0.0, 0.0, 1.0]


def test_a_full_file_gives_way_to_a_new_one_and_so_does_that_of_an_earlier_run(tmp_path: Path) -> None:
    path = tmp_path / "W.csv"
    for run in range(2):
        file = RecordFile(path, 4096)
        file.write((past(float(number)) for number in range(400 * run, 400 * run + 300)), oldest=None)
        file.close()
    kept = rows(path.with_name("W.csv.1")) + rows(path)
    assert path.stat().st_size < 4300
    assert 100 < len(kept) < 300
    assert rows(path)[0]["arrival_s"] == "0.0000"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["W.csv", "W.csv.1"]


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"router\.record") as error:
        RecordFile(tmp_path / "none" / "W.csv", 4096)
    assert error.value.field == "router.record"


def test_what_was_taken_is_written_though_the_router_stops_and_its_threads_are_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_module, "WRITE_S", 0.0)

    class Taken(Recording):
        """Says when something was taken."""

        taken = asyncio.Event()

        def take(self) -> list[Past]:
            if found := super().take():
                self.taken.set()
            return found

    async def stops() -> None:
        over, threads = threading.Event(), ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(threads)
        threads.submit(over.wait)
        recording = Taken(ManualClock())
        recording.ended(past(1.0))
        writing = asyncio.create_task(keep_written(recording, RecordFile(tmp_path / "W.csv", 1 << 20), lambda: None))
        await recording.taken.wait()
        recording.ended(past(2.0))
        writing.cancel()
        await asyncio.wait([writing])
        over.set()

    asyncio.run(stops())
    assert [row["arrival_s"] for row in rows(tmp_path / "W.csv")] == ["0.0000", "1.0000"]


def test_a_router_records_what_it_serves(site, tmp_path: Path) -> None:
    prompt = "a secret prompt"
    path = tmp_path / "W.csv"

    async def serve() -> None:
        async with site(record=path) as s:
            async with httpx.AsyncClient(base_url=s.url, timeout=20) as client:
                for _ in range(2):
                    answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 6})
                    assert answer.status_code == 200, answer.text
                refused = await client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": -1})
                assert refused.status_code == 400
            async with RouterClient(s.router.control) as router:
                window = await router.window(60.0)
            assert [(each.output_tokens, each.cached_tokens, each.ended) for each in window.requests] == [(6, 3, True)] * 2
            assert all(each.ttft is not None and each.tpot is not None for each in window.requests)
            assert window.requests[0].age > window.requests[1].age

    asyncio.run(serve())
    assert [row["output_tokens"] for row in rows(path)] == ["6", "6"]
    assert "secret" not in path.read_text()

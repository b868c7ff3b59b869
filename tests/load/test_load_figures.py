"""Percentiles, intervals, the SLO, the events of a stream, agreement: each against a slow and obvious twin."""

from __future__ import annotations

import json
import math
from statistics import NormalDist
from typing import Any

import pytest
from diptych.cluster.load.agreement import compare
from diptych.cluster.load.answer import Answer, Counting, Wire, kinds, read_answer
from diptych.cluster.load.dialect import Dialect, dialects
from diptych.cluster.load.report import Client, report, rows
from diptych.cluster.load.slo import Slo, parse_slo
from diptych.cluster.load.sse import EventReader
from diptych.cluster.load.summary import summarise, wilson
from diptych.cluster.load.workload import Arrival
from diptych.core.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.floats(0, 100), min_size=1, max_size=200))
def test_percentiles_are_the_smallest_values_that_enough_do_not_exceed(values: list[float]) -> None:
    found = summarise(values)
    assert found is not None
    for share, value in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        assert value == min(v for v in values if sum(other <= v for other in values) >= share * len(values) - 1e-9)
    assert (found.count, found.max) == (len(values), max(values))
    assert summarise([]) is None


@given(st.integers(1, 2000), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_holds_the_shares_whose_own_test_would_not_refuse_what_was_seen(total: int, data: Any, confidence: float) -> None:
    met = data.draw(st.integers(0, total))
    low, high = wilson(met, total, confidence)
    assert 0 <= low <= met / total <= high <= 1
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    for end in (low, high):  # the definition: as far from what was seen as z standard deviations of its own
        if 0 < end < 1:
            assert abs(met / total - end) == pytest.approx(z * math.sqrt(end * (1 - end) / total), rel=1e-6, abs=1e-9)


EVENTS = st.lists(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")), min_size=1, max_size=3))


@given(EVENTS, st.sampled_from([b"\n", b"\r\n"]), st.lists(st.integers(1, 9)))
def test_events_are_the_same_however_their_bytes_are_cut(events: list[list[bytes]], end: bytes, cuts: list[int]) -> None:
    whole = b"".join(b": note" + end + b"".join(b"data: " + line + end for line in lines) + b"id: 3" + end + end for lines in events)
    reader, found, at = EventReader(), list[bytes](), 0
    for cut in cuts:
        found += reader.feed(whole[at : at + cut])
        at += cut
    found += reader.feed(whole[at:])
    assert found == [b"\n".join(lines) for lines in events]


def wire(*events: tuple[float, dict[str, Any] | bytes], status: int = 200, failure: str | None = None, body: bytes = b"") -> Wire:
    stamped = [(at, data if isinstance(data, bytes) else json.dumps(data).encode()) for at, data in events]
    return Wire(100.0, 100.001, status, stamped, body, stamped[-1][0] if stamped else 101.0, failure)


def text(piece: str, usage: int | None = None, ids: int | None = None) -> dict[str, Any]:
    choice: dict[str, Any] = {"text": piece} | ({"token_ids": [1] * ids} if ids is not None else {})
    return {"choices": [choice]} | ({"usage": {"prompt_tokens": 5, "completion_tokens": usage}} if usage is not None else {})


LAST = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}, "timing": {"ttft": 0.4, "transport": "shm"}}
ASKED = Arrival(0, 0.5, 5, 4)


def read(*events: tuple[float, dict[str, Any] | bytes], whole: bool = True, **rest: Any) -> Answer:
    return read_answer(ASKED, wire(*events, **rest), 99.0, whole=whole)


def test_tokens_of_one_event_have_one_time_and_are_counted_by_usage() -> None:
    answer = read((100.5, text("a", 1)), (101.0, text("", 2)), (101.5, text("bc", 4)), (101.6, LAST), (101.6, b"[DONE]"))
    assert answer.token_times == (0.5, 1.0, 1.5, 1.5)
    assert (answer.events, answer.shared_events, answer.counting) == (3, 1, Counting.USAGE)
    assert (answer.ttft, answer.gap, answer.itl) == (0.5, 0.5, [0.5, 0.0])
    assert answer.tpot == pytest.approx(1.0 / 3)
    assert answer.e2e == pytest.approx(1.6)
    assert (answer.lag, answer.server_ttft, answer.handed_over, answer.error) == (0.5, 0.4, True, None)


def test_tokens_are_counted_by_ids() -> None:
    answer = read((100.5, text("a", ids=1)), (101.0, text("bc", ids=3)), (101.0, b"[DONE]"))
    assert (answer.token_times, answer.counting, answer.output_tokens) == ((0.5, 1.0, 1.0, 1.0), Counting.TOKEN_IDS, 4)


def test_where_nothing_tells_an_event_is_a_token_and_the_total_keeps_tpot_right() -> None:
    answer = read((100.5, text("a")), (101.0, text("bc")), (101.2, text("")), (101.5, text("d")), (101.5, LAST), (101.5, b"[DONE]"))
    assert (answer.token_times, answer.counting, answer.output_tokens) == ((0.5, 1.0, 1.5), Counting.EVENTS, 4)
    assert answer.tpot == pytest.approx(1.0 / 3)
    assert answer.error is None


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (read((100.5, text("a", 1)), failure="connection lost"), "connection lost"),
        (read(status=429, body=b'{"error": {"code": "overloaded"}}'), "HTTP 429: overloaded"),
        (read(status=502, body=b"<html>"), "HTTP 502: no reason given"),
        (read((100.5, text("a", 1)), (101.0, {"error": {"type": "server_error"}})), "error event: server_error"),
        (read((100.5, text("a", 4))), "stream without its end"),
        (read((100.5, b"[DONE]")), "no tokens"),
        (read((100.5, text("a", 3)), (100.6, b"[DONE]")), "fewer tokens than asked for"),
        (read((100.5, text("a", 5)), (100.6, b"[DONE]")), "more tokens than asked for"),
        (read((100.5, b"{"), (100.6, b"[DONE]")), "event that is no JSON object"),
    ],
)
def test_errors_have_kinds(answer: Answer, kind: str) -> None:
    assert answer.error == kind
    assert kinds([answer, answer]) == {kind: 2}
    assert not Slo().met(answer)


def test_a_short_answer_is_none_where_the_server_may_end_it() -> None:
    assert read((100.5, text("a", 3)), (100.6, b"[DONE]"), whole=False).error is None


def answered(number: int, ttft: float, step: float, server: float | None = None) -> Answer:
    times = tuple(ttft + step * i for i in range(4))
    return Answer(
        Arrival(number, number * 1.0, 5, 4), number + 0.001, 0.0005, times[-1], times, 4, 5, 4, 0, Counting.USAGE, None, server, True
    )


@given(st.floats(0.01, 2), st.floats(0.01, 0.5), st.floats(0.01, 2), st.floats(0.01, 0.5))
def test_an_slo_is_met_jointly(ttft: float, tpot: float, limit_ttft: float, limit_tpot: float) -> None:
    answer = answered(0, ttft, tpot)
    assert answer.tpot is not None
    assert Slo(limit_ttft, limit_tpot).met(answer) == (ttft <= limit_ttft and answer.tpot <= limit_tpot)


def test_slos_are_read_and_said() -> None:
    assert parse_slo("ttft=1s, tpot=100ms") == Slo(ttft=1.0, tpot=0.1)
    assert parse_slo("ttft=.2s") == Slo(ttft=0.2)
    for part, said in (("ttft=0.2", "'ttft=0.2' has no unit: ttft=0.2s is seconds"), ("tpot=0s", "a limit is above 0")):
        with pytest.raises(ConfigError, match=said):
            parse_slo(part)
    assert str(parse_slo("e2e=1.5s,ttft=250ms")) == "ttft=250ms,e2e=1500ms"
    for wrong in ("", "ttft=1", "itl=3ms", "ttft=1s,ttft=2s", "tpot=-1s"):
        with pytest.raises(ConfigError, match="--slo"):
            parse_slo(wrong)


def test_dialects_leave_out_least_first_and_every_one_once() -> None:
    every = list(dialects())
    assert every[0] == Dialect()
    assert len(every) == len(set(every)) == 12  # 16, less those with running but no usage
    assert [len(dialect.missing) for dialect in every] == sorted(len(dialect.missing) for dialect in every)
    assert every[1].missing == ["running_usage"]
    body = json.loads(Dialect(running_usage=False, ignore_eos=False).body("m", [1, 2], 3))
    assert body == {
        "model": "m", "prompt": [1, 2], "max_tokens": 3, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_a_report_leaves_the_warm_up_out() -> None:
    answers = [answered(number, 9.0 if number < 2 else 0.1, 0.01, server=0.0995) for number in range(6)]
    found = report(answers, warm_up=2, unfinished=1, slo=Slo(1.0, 0.1), client=Client(10.0, 0.5, (0.001,)))
    assert (found.requests, found.warm_up, found.unfinished) == (4, 2, 1)
    assert found.times["ttft"].max == 0.1
    assert found.attainment is not None
    assert (found.attainment.met, found.attainment.total) == (4, 4)
    assert found.seconds == pytest.approx(3 + 0.13)
    assert found.output_tokens_per_s == pytest.approx(16 / 3.13)
    assert found.times["itl"].count == 8
    assert found.handed_over == 4
    assert found.client.cpu_share == 0.05
    assert found.agreement is not None
    assert found.agreement.agrees
    assert json.loads(json.dumps(found.as_json()))["attainment"]["share"] == 1.0
    assert [row["counted"] for row in rows(answers, 2)] == [False] * 2 + [True] * 4


def test_errors_miss_the_slo_and_have_no_times() -> None:
    failed = read(status=503, body=b"{}")
    found = report([failed, answered(1, 0.1, 0.01)], warm_up=0, unfinished=0, slo=Slo(1.0), client=Client(1.0, 0.0, ()))
    assert found.errors == {"HTTP 503: no reason given": 1}
    assert found.attainment is not None
    assert found.attainment.share == 0.5
    assert found.times["ttft"].count == 1


def test_disagreement_is_told_with_what_is_known_of_why() -> None:
    agreement = compare([answered(0, 0.1, 0.01, server=0.099), answered(1, 0.2, 0.01, server=0.15)], [0.004])
    assert agreement is not None
    assert (agreement.close, agreement.compared, agreement.agrees) == (1, 2, False)
    assert agreement.rest.max == pytest.approx(0.05 - 0.0005)
    assert "1 of 2" in agreement.sentence()
    assert "Connecting took p99 0.50 ms; the client itself woke late by p99 4.00 ms" in agreement.sentence()
    assert compare([answered(0, 0.1, 0.01)], []) is None

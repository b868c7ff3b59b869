"""Having another process recorded, over a real port: begin, end, what is refused, and that a stream that ends takes its recording along."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from diptych.core.errors import InvalidRequest, Overloaded, Unavailable
from diptych.core.recordings import BeginSpans, Doing, EndSpans, Span, SpansAnswer, SpansBegun, SpansEnded, SpansTold, ThreadTime
from diptych.core.spans import Recording, span
from diptych.proto import worker_pb2 as pb
from diptych.rpc import spans as spans_module
from diptych.rpc.codec_spans import decode_spans_answer, decode_spans_command, encode_spans_answer, encode_spans_command
from diptych.rpc.spans import LONGEST_S, MOST, SpansClient

SPANS = (
    Span(Doing.STEP, 11, 10**15, 10**15 + 5, 4, 3, ("a", "b")),
    Span(Doing.INPUTS, 11, 10**15 + 1, 10**15 + 2, 1, 3, ()),
    Span(Doing.STEP, 12, 10**15, 10**15, 0, -1, ()),
)


@pytest.mark.parametrize("command", [BeginSpans(2.5, 100), EndSpans()])
def test_commands_cross_unchanged(command: BeginSpans | EndSpans) -> None:
    assert decode_spans_command(encode_spans_command(command)) == command


@pytest.mark.parametrize(
    "answer",
    [SpansBegun("h", 2**63, 77), SpansTold(SPANS), SpansTold(()), SpansEnded(5, 2**60, (ThreadTime(7, "engine", 2**40, 3),), 9)],
)
def test_answers_cross_unchanged(answer: SpansAnswer) -> None:
    assert decode_spans_answer(encode_spans_answer(answer)) == answer


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.SpansAnswer(), "answer"),
        (pb.SpansAnswer(spans=pb.Spans(kind=[0], thread=[1], began=[1], lasted=[1], ran=[1])), "spans.kind"),
        (pb.SpansAnswer(spans=pb.Spans(kinds=[pb.SpanKind(doing="step")], kind=[0], thread=[1], began=[1], lasted=[1])), "spans"),
        (pb.SpansAnswer(spans=pb.Spans(kinds=[pb.SpanKind(doing="naps")])), "spans.kinds.doing"),
    ],
)
def test_what_is_no_answer_is_refused_by_field(message: pb.SpansAnswer, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        decode_spans_answer(message.SerializeToString())
    assert raised.value.field == field


def test_a_process_is_recorded_from_begin_to_end(serving: Any, echo_worker: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans_module, "AT_ONCE", 7)

    async def scenario() -> None:
        async with serving(worker=echo_worker()) as server:
            client = SpansClient(server.address)
            clock = await client.begin(60.0, 1000)
            assert (clock.ahead, clock.unsure) == (0, 0), "one host, one clock"
            for step in range(30):
                with span(Doing.STEP, step, ("x",)):
                    pass
            recorded = await client.end()
            assert [each.step for each in recorded.spans if each.doing is Doing.STEP] == list(range(30))
            assert recorded.began < recorded.ended
            assert any(thread.ran for thread in recorded.threads)
            await client.close()

    asyncio.run(scenario())


def test_clocks_of_two_hosts_are_compared(serving: Any, echo_worker: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = iter(("there", "here"))
    monkeypatch.setattr(spans_module, "_host", lambda: next(hosts))

    async def scenario() -> None:
        async with serving(worker=echo_worker()) as server:
            client = SpansClient(server.address)
            clock = await client.begin(60.0, 1000)
            assert clock.host == "there"
            assert abs(clock.ahead) <= clock.unsure, "in truth they are one"
            await client.close()

    asyncio.run(scenario())


def test_a_second_recording_is_refused_until_the_first_has_ended(serving: Any, echo_worker: Callable[[], Any]) -> None:
    async def scenario() -> None:
        async with serving(worker=echo_worker()) as server:
            first, second = SpansClient(server.address), SpansClient(server.address)
            await first.begin(60.0, 1000)
            with pytest.raises(Overloaded):
                await second.begin(60.0, 1000)
            await first.close()
            await free()
            await second.close()

    asyncio.run(scenario())


async def free() -> None:
    """Nobody records here (any more)."""
    async with asyncio.timeout(60.0):
        while True:
            try:
                Recording(1.0, 1).end()
                return
            except Overloaded:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("seconds", "most", "field"), [(0.0, 1, "seconds"), (LONGEST_S + 1, 1, "seconds"), (1.0, 0, "most"), (1.0, MOST + 1, "most")]
)
def test_what_may_not_be_is_refused_by_field(serving: Any, echo_worker: Callable[[], Any], seconds: float, most: int, field: str) -> None:
    async def scenario() -> None:
        async with serving(worker=echo_worker()) as server:
            client = SpansClient(server.address)
            with pytest.raises(InvalidRequest) as raised:
                await client.begin(seconds, most)
            assert raised.value.field == field
            await client.close()
            await free()

    asyncio.run(scenario())


def test_nobody_there_is_said() -> None:
    async def scenario() -> None:
        client = SpansClient("127.0.0.1:1")
        with pytest.raises(Unavailable):
            await client.begin(1.0, 1)
        await client.close()

    asyncio.run(scenario())

"""Recordings of spans ↔ their messages: exact inverses."""

from __future__ import annotations

from ..core.errors import InvalidRequest
from ..core.recordings import BeginSpans, Doing, EndSpans, Span, SpansAnswer, SpansBegun, SpansCommand, SpansEnded, SpansTold, ThreadTime
from ..proto import worker_pb2 as pb
from .codec_fields import chosen, duration, parse, word


def encode_spans_command(command: SpansCommand) -> bytes:
    match command:
        case BeginSpans(seconds, most):
            message = pb.SpansCommand(begin=pb.BeginSpans(seconds=seconds, most=most))
        case EndSpans():
            message = pb.SpansCommand(end=pb.EndSpans())
    return message.SerializeToString()


def decode_spans_command(data: bytes) -> SpansCommand:
    message = parse(pb.SpansCommand, data)
    if chosen(message, "command") == "end":
        return EndSpans()
    return BeginSpans(duration(message.begin.seconds, "seconds"), message.begin.most)


def encode_spans_answer(answer: SpansAnswer) -> bytes:
    match answer:
        case SpansBegun(host, now, pid):
            message = pb.SpansAnswer(begun=pb.SpansBegun(host=host, now=now, pid=pid))
        case SpansTold(spans):
            message = pb.SpansAnswer(spans=_write_spans(spans))
        case SpansEnded(began, ended, threads, lost):
            times = [pb.ThreadTime(thread=each.thread, name=each.name, ran=each.ran, ready=each.ready) for each in threads]
            message = pb.SpansAnswer(ended=pb.SpansEnded(began=began, ended=ended, lost=lost, threads=times))
    return message.SerializeToString()


def decode_spans_answer(data: bytes) -> SpansAnswer:
    message = parse(pb.SpansAnswer, data)
    match chosen(message, "answer"):
        case "begun":
            return SpansBegun(message.begun.host, message.begun.now, message.begun.pid)
        case "spans":
            return SpansTold(_read_spans(message.spans))
        case _:
            told = message.ended
            threads = tuple(ThreadTime(each.thread, each.name, each.ran, each.ready) for each in told.threads)
            return SpansEnded(told.began, told.ended, threads, told.lost)


def _write_spans(spans: tuple[Span, ...]) -> pb.Spans:
    kinds: dict[tuple[Doing, int, tuple[str, ...]], int] = {}
    kind = [kinds.setdefault((each.doing, each.step, each.who), len(kinds)) for each in spans]
    return pb.Spans(
        kinds=[pb.SpanKind(doing=doing, step=step, who=who) for doing, step, who in kinds],
        kind=kind,
        thread=[each.thread for each in spans],
        began=[each.began for each in spans],
        lasted=[each.ended - each.began for each in spans],
        ran=[each.on_core for each in spans],
    )


def _read_spans(message: pb.Spans) -> tuple[Span, ...]:
    kinds = [(word(Doing, kind.doing, "spans.kinds.doing"), kind.step, tuple(kind.who)) for kind in message.kinds]
    columns = (message.kind, message.thread, message.began, message.lasted, message.ran)
    if len({len(column) for column in columns}) > 1:
        raise InvalidRequest("The columns of spans differ in length.", field="spans")
    if any(kind >= len(kinds) for kind in message.kind):
        raise InvalidRequest("A span is of a kind that is not there.", field="spans.kind")
    return tuple(
        Span(kinds[kind][0], thread, began, began + lasted, ran, *kinds[kind][1:])
        for kind, thread, began, lasted, ran in zip(*columns, strict=True)
    )

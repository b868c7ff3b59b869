"""Codecs are exact inverses, and whatever bytes come in, only `InvalidRequest` with a field comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from diptych.core import commands, transfer
from diptych.core.errors import DiptychError, Internal, InvalidRequest, NotFound, TransferFailed, to_wire
from diptych.core.fleet import Fleet, Member, Phase, WorkerReport, WorkerState
from diptych.core.generate import Chunk, Finish, Generate, Model, Timing, Usage
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.recordings import BeginSpans, Doing, EndSpans, Span, SpansBegun, SpansEnded, SpansTold, ThreadTime
from diptych.core.request import FinishReason, Request, Slo, Token, Tokens
from diptych.core.sampling import SamplingParams
from diptych.core.workload import Recorded, Window
from diptych.proto import inference_pb2, worker_pb2
from diptych.rpc import codec_commands, codec_fleet, codec_inference, codec_lane, codec_spans, codec_workload
from hypothesis import given, settings
from hypothesis import strategies as st

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
reals = st.floats(allow_nan=False, allow_infinity=False)
seconds = st.floats(0, 1e9)
texts = st.text(max_size=12)
ids = st.lists(u32, max_size=6).map(tuple)


def opt(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def many(strategy: st.SearchStrategy[Any], least: int = 0) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(strategy, min_size=least, max_size=3).map(tuple)


biases = st.dictionaries(u32, reals, max_size=4).map(lambda bias: tuple(sorted(bias.items())))
sampling = st.builds(
    SamplingParams, u32, reals, reals, u32, opt(u64), ids, st.booleans(), opt(u32), reals, reals, reals, reals, biases, u32, u32
)
requests = st.builds(
    Request,
    texts,
    texts,
    many(st.builds(Tokens, ids)),
    sampling,
    many(ids),
    st.frozensets(u32, max_size=3),
    texts,
    texts,
    st.integers(-(2**31), 2**31 - 1),
    st.builds(Slo, opt(seconds), opt(seconds)),
)
tokens = st.builds(Token, u32, u32, opt(reals), many(st.tuples(u32, reals)), u32)
finishes = st.sampled_from(FinishReason)
errors = st.builds(
    lambda kind, message, field: kind(message, field=field), st.sampled_from((InvalidRequest, TransferFailed, NotFound)), texts, opt(texts)
)
command_values = st.one_of(
    st.builds(commands.Prefill, texts, requests, opt(texts)),
    st.builds(commands.Decode, texts, requests, st.booleans()),
    st.builds(commands.Stop, texts, opt(u32)),
)
events = st.one_of(
    st.builds(
        lambda attempt_id, drawn, *rest: commands.FirstTokens(
            attempt_id, tuple(token for token, _ in drawn), tuple(finish for _, finish in drawn), *rest
        ),
        texts,
        many(st.tuples(tokens, opt(finishes))),
        seconds,
        seconds,
        u32,
    ),
    st.builds(commands.HandedOver, texts, u64, seconds, texts),
    st.builds(commands.NewTokens, texts, many(tokens)),
    st.builds(commands.ChoiceFinished, texts, u32, finishes),
    st.builds(commands.Movable, texts),
    st.builds(commands.Finished, texts, u32, u32, u32),
)


@st.composite
def layouts_of_any_parallelism(draw: st.DrawFn) -> Layout:
    tp, count = draw(st.integers(1, 8)), draw(st.integers(0, 3))
    layers = draw(st.lists(st.integers(0, 50), unique=True, max_size=9))
    groups = tuple(
        CacheGroup(
            CacheKind.WINDOW if window else CacheKind.FULL,
            tuple(layers[number::count]),
            draw(st.sampled_from([1, tp, 3 * tp])),
            draw(st.integers(1, 2**32 - 1)),
            draw(st.sampled_from(DType)),
            window,
        )
        for number, window in enumerate(draw(st.tuples(*[st.just(0) | st.integers(1, 2**32 - 1)] * count)))
    )
    stages = draw(st.just(()) | st.tuples(st.integers(1, 99), st.integers(51, 99)))
    return Layout(draw(texts), groups, draw(st.integers(1, 64)), draw(st.tuples(*[u32] * count)), tp, stages)


layouts = layouts_of_any_parallelism()
fleets = st.builds(Fleet, u64, many(st.builds(Member, texts, texts, st.sampled_from(Phase), u64, layouts, u32)))
reports = st.builds(WorkerReport, texts, u64, st.sampled_from(WorkerState), u32, u32, u64, u32, u32, u32, many(st.tuples(texts, reals)))
epochs = st.builds(transfer.Epoch, u64, u64)
shm = st.builds(transfer.ShmEndpoint, texts, st.binary(min_size=16, max_size=16))
ready = st.builds(
    lambda start, length, *rest: transfer.Ready(*rest[:5], start, start + length, *rest[5:]),
    st.integers(0, 2**31),
    st.integers(1, 2**30),
    texts,
    epochs,
    u32,
    u32,
    ids,
    ids,
    u32,
    u64,
    u32,
)


def written_at_once(messages: list[transfer.LaneMessage]) -> bytes:
    first, *rest = map(codec_lane.encode_lane_message, messages)
    return codec_lane.join_lane_messages(first, rest)


lane_messages = st.one_of(
    st.builds(transfer.Hello, texts, u64, layouts, many(shm), many(st.sampled_from(transfer.Transport)), u32),
    st.builds(transfer.Rendezvous, u32, texts, st.binary(max_size=40)),
    st.builds(transfer.Offer, texts, u32),
    st.builds(transfer.NearlyDone, texts),
    st.builds(transfer.Grant, texts, epochs, many(st.builds(transfer.GroupGrant, u32, ids))),
    st.builds(transfer.Refused, texts, st.sampled_from(transfer.RefusedReason), texts),
    ready,
    st.builds(transfer.Commit, texts, u32, many(tokens)),
    st.builds(transfer.Ack, texts, u64, seconds),
    st.builds(transfer.Cancel, texts, texts),
    st.builds(transfer.KeepAlive, many(texts)),
)
calls = st.builds(
    Generate, st.text(min_size=1, max_size=20) | many(u32, least=1), texts, sampling, many(st.text(min_size=1, max_size=9)), texts
)
finish_values = st.builds(
    Finish,
    st.builds(Usage, u32, u32, u32),
    st.builds(Timing, seconds, opt(seconds), opt(seconds), u64, seconds, texts, texts, texts, u32),
)
chunks = st.builds(Chunk, texts, texts, many(tokens), opt(finish_values), u32, opt(finishes))
models = many(st.builds(Model, texts, u32, u32, st.booleans()))

windows = st.builds(Window, seconds, many(st.builds(Recorded, seconds, u32, u32, u32, opt(seconds), opt(seconds), st.booleans())))

spans = st.builds(
    lambda doing, thread, began, lasted, *rest: Span(doing, thread, began, began + lasted, *rest),
    st.sampled_from(Doing), u32, u64, u64, u64, st.integers(-(2**63), 2**63 - 1), many(texts),
)  # fmt: skip
spans_answers = st.one_of(
    st.builds(SpansBegun, texts, u64, u32),
    st.builds(SpansTold, many(spans)),
    st.builds(SpansEnded, u64, u64, many(st.builds(ThreadTime, u32, texts, u64, u64)), u64),
)

CODECS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "command": (command_values, codec_commands.encode_command, codec_commands.decode_command),
    "step events": (st.builds(commands.StepEvents, many(events)), codec_commands.encode_step_events, codec_commands.decode_step_events),
    "fleet": (fleets, codec_fleet.encode_fleet, codec_fleet.decode_fleet),
    "report": (reports, codec_fleet.encode_report, codec_fleet.decode_report),
    "fleet status": (st.tuples(fleets, many(reports)), codec_fleet.encode_fleet_status, codec_fleet.decode_fleet_status),
    "workload": (windows, codec_workload.encode_window, codec_workload.decode_window),
    "spans command": (
        st.one_of(st.builds(BeginSpans, seconds, u32), st.just(EndSpans())),
        codec_spans.encode_spans_command,
        codec_spans.decode_spans_command,
    ),
    "spans answer": (spans_answers, codec_spans.encode_spans_answer, codec_spans.decode_spans_answer),
    "lane message": (st.lists(lane_messages, min_size=1, max_size=3), written_at_once, codec_lane.decode_lane_messages),
    "generate": (calls, codec_inference.encode_generate, codec_inference.decode_generate),
    "chunk": (chunks, codec_inference.encode_chunk, codec_inference.decode_chunk),
    "models": (models, codec_inference.encode_models, codec_inference.decode_models),
}
each_codec = pytest.mark.parametrize("name", CODECS)


@each_codec
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_decode_is_the_inverse_of_encode(name: str, data: st.DataObject) -> None:
    values, encode, decode = CODECS[name]
    value = data.draw(values)
    assert decode(encode(value)) == value


@settings(max_examples=30, deadline=None)
@given(errors)
def test_failures_cross_whole(error: DiptychError) -> None:
    step = commands.StepEvents((commands.Failed("a", error),))
    (failed,) = codec_commands.decode_step_events(codec_commands.encode_step_events(step)).events
    assert isinstance(failed, commands.Failed)
    assert type(failed.error) is type(error)
    assert to_wire(failed.error) == to_wire(error)


@each_codec
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=80))
def test_any_bytes_are_read_or_refused_by_field(name: str, data: bytes) -> None:
    _read_or_refuse(CODECS[name][2], data)


@each_codec
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_messages_are_read_or_refused_by_field(name: str, data: st.DataObject) -> None:
    values, encode, decode = CODECS[name]
    damaged = bytearray(encode(data.draw(values)))
    for _ in range(data.draw(st.integers(1, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    del damaged[len(damaged) - data.draw(st.integers(0, min(4, len(damaged)))) :]
    _read_or_refuse(decode, bytes(damaged))


def _read_or_refuse(decode: Callable[[bytes], Any], data: bytes) -> None:
    try:
        decode(data)
    except InvalidRequest as error:
        refused = error
    else:
        return
    assert refused.field
    assert refused.message


W, P = worker_pb2, inference_pb2
LAYOUT = W.Layout(fingerprint="f", block_size=16, tp=1)
NAN, INF = float("nan"), float("inf")
MALFORMED: list[tuple[str, Any, str]] = [
    ("command", W.Command(), "command"),
    ("command", W.Command(prefill=W.Prefill(attempt_id="a")), "request"),
    ("command", W.Command(decode=W.Decode(attempt_id="a", request=W.Request())), "sampling"),
    ("command", W.Command(decode=W.Decode(request=W.Request(sampling=W.Sampling(temperature=NAN)))), "temperature"),
    ("command", W.Command(decode=W.Decode(request=W.Request(sampling=W.Sampling(), prompt=[W.Part()]))), "part"),
    ("command", W.Command(decode=W.Decode(request=W.Request(sampling=W.Sampling(), slo_ttft=-1.0))), "slo_ttft"),
    ("step events", W.StepEvents(events=[W.Event(attempt_id="a")]), "event"),
    ("step events", W.StepEvents(events=[W.Event(first_tokens=W.FirstTokens(tokens=[W.Token()]))]), "first_tokens.finishes"),
    ("step events", W.StepEvents(events=[W.Event(choice_finished=W.ChoiceFinished(finish="tired"))]), "choice_finished.finish"),
    ("step events", W.StepEvents(events=[W.Event(handed_over=W.HandedOver(seconds=INF))]), "handed_over.seconds"),
    ("step events", W.StepEvents(events=[W.Event(failed=W.Error())]), "failed.code"),
    ("fleet", W.Fleet(members=[W.Member(phase="decode")]), "members.layout"),
    ("fleet", W.Fleet(members=[W.Member(phase="both", layout=LAYOUT)]), "members.phase"),
    ("fleet", W.Fleet(members=[W.Member(phase="decode", layout=W.Layout(tp=1))]), "layout.block_size"),
    ("fleet", W.Fleet(members=[W.Member(phase="decode", layout=W.Layout(block_size=16))]), "layout.tp"),
    ("fleet", W.Fleet(members=[W.Member(phase="decode", layout=W.Layout(block_size=16, tp=1, stages=[0, 1]))]), "layout.stages"),
    ("report", W.WorkerReport(state="fine"), "state"),
    ("report", W.WorkerReport(state="ready", counters=[W.Counter(name="n", value=NAN)]), "counters"),
    ("lane message", W.LaneMessage(), "message"),
    ("lane message", W.LaneMessage(hello=W.Hello()), "hello.layout"),
    ("lane message", W.LaneMessage(hello=W.Hello(layout=LAYOUT, shm=[W.ShmEndpoint(socket="s", nonce=b"short")])), "hello.shm.nonce"),
    ("lane message", W.LaneMessage(hello=W.Hello(layout=W.Layout(block_size=16, tp=1, num_blocks=[1]))), "layout.num_blocks"),
    (
        "lane message",
        W.LaneMessage(hello=W.Hello(layout=W.Layout(groups=[W.CacheGroup(kind="ring")], num_blocks=[1], block_size=16, tp=1))),
        "layout.groups.kind",
    ),
    (
        "lane message",
        W.LaneMessage(
            hello=W.Hello(
                layout=W.Layout(
                    groups=[W.CacheGroup(kind="window", kv_heads=1, head_dim=1, dtype="float32")], num_blocks=[1], block_size=16, tp=1
                )
            )
        ),
        "layout.groups.window",
    ),
    ("lane message", W.LaneMessage(grant=W.Grant(transfer_id="t")), "epoch"),
    ("lane message", W.LaneMessage(ready=W.Ready(epoch=W.Epoch(), start=16, stop=16)), "ready.stop"),
    ("lane message", W.LaneMessage(refused=W.Refused(reason="mood")), "refused.reason"),
    ("lane message", W.LaneMessage(ack=W.Ack(seconds=-1)), "ack.seconds"),
    ("generate", P.GenerateRequest(), "prompt"),
    ("generate", P.GenerateRequest(text=""), "prompt"),
    ("generate", P.GenerateRequest(token_ids=P.TokenIds()), "prompt"),
    ("generate", P.GenerateRequest(text="x", stop=["a"] * 17), "stop"),
    ("generate", P.GenerateRequest(text="x", stop=[""]), "stop"),
    ("generate", P.GenerateRequest(text="x", stop=["a" * 2000]), "stop"),
    ("generate", P.GenerateRequest(text="x", request_id="r" * 200), "request_id"),
    ("generate", P.GenerateRequest(text="x", sampling=P.Sampling(temperature=NAN)), "temperature"),
    ("generate", P.GenerateRequest(text="x", sampling=P.Sampling(top_p=INF)), "top_p"),
    ("generate", P.GenerateRequest(text="x", sampling=P.Sampling(min_p=NAN)), "min_p"),
    ("generate", P.GenerateRequest(text="x", sampling=P.Sampling(logit_bias={3: INF})), "logit_bias"),
    ("chunk", P.GenerateResponse(finish=P.Finish()), "finish.usage"),
    ("chunk", P.GenerateResponse(reason="tired"), "reason"),
]


@pytest.mark.parametrize(("name", "message", "field"), MALFORMED)
def test_malformed_messages_name_their_field(name: str, message: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        CODECS[name][2](message.SerializeToString())
    assert raised.value.field == field
    assert len(raised.value.message) < 300


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="UTF-8"):
        codec_inference.decode_generate(b"\x12\x02\xff\xfe")


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (Generate("a\ud800b"), "prompt"),
        (Generate((1, -1)), "prompt"),
        (Generate((2**32,)), "prompt"),
        (Generate("a", stop=("\udfff",)), "stop"),
        (Generate("a", sampling=SamplingParams(max_tokens=-1)), "max_tokens"),
        (Generate("a", sampling=SamplingParams(temperature=NAN)), "temperature"),
        (Generate("a", sampling=SamplingParams(seed=2**64)), "seed"),
        (Generate("a", sampling=SamplingParams(stop_token_ids=(-5,))), "stop_token_ids"),
        (Generate("a", sampling=SamplingParams(logit_bias=((-5, 1.0),))), "logit_bias"),
        (Generate("a", sampling=SamplingParams(presence_penalty=NAN)), "presence_penalty"),
        (Generate("a", sampling=SamplingParams(min_tokens=-1)), "min_tokens"),
    ],
)
def test_what_the_wire_cannot_carry_is_named_before_it_is_sent(call: Generate, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        codec_inference.encode_generate(call)
    assert raised.value.field == field


def test_what_a_client_leaves_out_gets_the_defaults() -> None:
    call = codec_inference.decode_generate(P.GenerateRequest(text="x").SerializeToString())
    assert call == Generate("x", sampling=SamplingParams())


def test_an_error_of_a_newer_peer_is_internal_and_says_its_code() -> None:
    message = W.StepEvents(events=[W.Event(attempt_id="a", failed=W.Error(code="new", message="m"))])
    (failed,) = codec_commands.decode_step_events(message.SerializeToString()).events
    assert isinstance(failed, commands.Failed)
    assert isinstance(failed.error, Internal)
    assert "new" in failed.error.message

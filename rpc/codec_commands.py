"""Commands and step events ↔ their messages: exact inverses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..core.commands import (
    ChoiceFinished,
    Command,
    Decode,
    Event,
    Failed,
    Finished,
    FirstTokens,
    HandedOver,
    Movable,
    NewTokens,
    Prefill,
    StepEvents,
    Stop,
)
from ..core.errors import InvalidRequest, from_wire, to_wire
from ..core.request import FinishReason, Request, Slo, Token, Tokens
from ..core.sampling import SamplingParams
from ..proto import worker_pb2 as pb
from .codec_fields import chosen, duration, finite, parse, present, word


def encode_command(command: Command) -> bytes:
    message = pb.Command()
    match command:
        case Prefill(attempt_id, request, destination):
            message.prefill.CopyFrom(pb.Prefill(attempt_id=attempt_id, request=_request(request), destination=destination))
        case Decode(attempt_id, request, local_prefill):
            message.decode.CopyFrom(pb.Decode(attempt_id=attempt_id, request=_request(request), local_prefill=local_prefill))
        case Stop(attempt_id, choice):
            message.stop.CopyFrom(pb.Stop(attempt_id=attempt_id, choice=choice))
    return message.SerializeToString()


def decode_command(data: bytes) -> Command:
    message = parse(pb.Command, data)
    match chosen(message, "command"):
        case "prefill":
            prefill = message.prefill
            present(prefill, "request")
            destination = prefill.destination if prefill.HasField("destination") else None
            return Prefill(prefill.attempt_id, read_request(prefill.request), destination)
        case "decode":
            present(message.decode, "request")
            return Decode(message.decode.attempt_id, read_request(message.decode.request), message.decode.local_prefill)
        case _:
            return Stop(message.stop.attempt_id, message.stop.choice if message.stop.HasField("choice") else None)


def _request(request: Request) -> pb.Request:
    return pb.Request(
        request_id=request.request_id,
        model=request.model,
        prompt=[pb.Part(tokens=pb.Tokens(ids=part.ids)) for part in request.prompt],
        sampling=_sampling(request.sampling),
        generated=[pb.Tokens(ids=ids) for ids in request.generated],
        finished=sorted(request.finished),
        adapter=request.adapter,
        tenant=request.tenant,
        priority=request.priority,
        slo_ttft=request.slo.ttft,
        slo_tpot=request.slo.tpot,
    )


def read_request(message: pb.Request) -> Request:
    present(message, "sampling")
    return Request(
        request_id=message.request_id,
        model=message.model,
        prompt=tuple(_read_part(part) for part in message.prompt),
        sampling=_read_sampling(message.sampling),
        generated=tuple(tuple(tokens.ids) for tokens in message.generated),
        finished=frozenset(message.finished),
        adapter=message.adapter,
        tenant=message.tenant,
        priority=message.priority,
        slo=Slo(
            ttft=duration(message.slo_ttft, "slo_ttft") if message.HasField("slo_ttft") else None,
            tpot=duration(message.slo_tpot, "slo_tpot") if message.HasField("slo_tpot") else None,
        ),
    )


def _read_part(message: pb.Part) -> Tokens:
    chosen(message, "part")
    return Tokens(tuple(message.tokens.ids))


def _sampling(sampling: SamplingParams) -> pb.Sampling:
    return pb.Sampling(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        min_tokens=sampling.min_tokens,
        n=sampling.n,
    )


def _read_sampling(message: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        temperature=finite(message.temperature, "temperature"),
        top_p=finite(message.top_p, "top_p"),
        top_k=message.top_k,
        seed=message.seed if message.HasField("seed") else None,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        min_p=finite(message.min_p, "min_p"),
        repetition_penalty=finite(message.repetition_penalty, "repetition_penalty"),
        presence_penalty=finite(message.presence_penalty, "presence_penalty"),
        frequency_penalty=finite(message.frequency_penalty, "frequency_penalty"),
        logit_bias=tuple((token, finite(bias, "logit_bias")) for token, bias in sorted(message.logit_bias.items())),
        min_tokens=message.min_tokens,
        n=message.n,
    )


def write_token(token: Token) -> pb.Token:
    message = pb.Token(index=token.index, id=token.id, logprob=token.logprob, choice=token.choice)
    for top_id, logprob in token.top:
        message.top.add(id=top_id, logprob=logprob)
    return message


def read_token(message: pb.Token) -> Token:
    return Token(
        index=message.index,
        id=message.id,
        logprob=message.logprob if message.HasField("logprob") else None,
        top=tuple((top.id, top.logprob) for top in message.top) if message.top else (),
        choice=message.choice,
    )


def read_tokens(messages: Iterable[pb.Token]) -> tuple[Token, ...]:
    return tuple(read_token(message) for message in messages)


def encode_step_events(step: StepEvents) -> bytes:
    message = pb.StepEvents()
    for event in step.events:
        _write_event(message.events.add(attempt_id=event.attempt_id), event)
    return message.SerializeToString()


def _write_event(message: pb.Event, event: Event) -> None:
    match event:
        case NewTokens(_, tokens, queued):
            message.new_tokens.tokens.extend([write_token(token) for token in tokens])
            message.new_tokens.SetInParent()
            if queued is not None:
                message.new_tokens.queued = queued
        case FirstTokens(_, tokens, finishes, queued, computed, cached):
            message.first_tokens.CopyFrom(
                pb.FirstTokens(
                    tokens=[write_token(token) for token in tokens],
                    finishes=[finish or "" for finish in finishes],
                    queued=queued,
                    computed=computed,
                    cached_tokens=cached,
                )
            )
        case HandedOver(_, kv_bytes, seconds, transport, exposed):
            message.handed_over.CopyFrom(pb.HandedOver(kv_bytes=kv_bytes, seconds=seconds, transport=transport, exposed=exposed))
        case ChoiceFinished(_, choice, finish):
            message.choice_finished.CopyFrom(pb.ChoiceFinished(choice=choice, finish=finish))
        case Movable():
            message.movable.SetInParent()
        case Finished(_, cached, local, recomputed):
            message.finished.CopyFrom(pb.Finished(cached_tokens=cached, local_prefill_tokens=local, recomputed_tokens=recomputed))
        case Failed(_, error):
            code, text, field = to_wire(error)
            message.failed.CopyFrom(pb.Error(code=code, message=text, field=field))


def decode_step_events(data: bytes) -> StepEvents:
    return StepEvents(tuple(_READ_EVENT[chosen(event, "event")](event) for event in parse(pb.StepEvents, data).events))


def _read_new_tokens(event: pb.Event) -> NewTokens:
    new = event.new_tokens
    queued = duration(new.queued, "new_tokens.queued") if new.HasField("queued") else None
    return NewTokens(event.attempt_id, read_tokens(new.tokens), queued)


def _read_first_tokens(event: pb.Event) -> FirstTokens:
    first = event.first_tokens
    if len(first.finishes) != len(first.tokens):
        raise InvalidRequest(
            f"first_tokens has {len(first.tokens)} tokens and {len(first.finishes)} finishes.", field="first_tokens.finishes"
        )
    return FirstTokens(
        event.attempt_id,
        read_tokens(first.tokens),
        tuple(word(FinishReason, finish, "first_tokens.finishes") if finish else None for finish in first.finishes),
        queued=duration(first.queued, "first_tokens.queued"),
        computed=duration(first.computed, "first_tokens.computed"),
        cached_tokens=first.cached_tokens,
    )


def _read_handed_over(event: pb.Event) -> HandedOver:
    done = event.handed_over
    seconds, exposed = duration(done.seconds, "handed_over.seconds"), duration(done.exposed, "handed_over.exposed")
    return HandedOver(event.attempt_id, done.kv_bytes, seconds, done.transport, exposed)


def _read_choice_finished(event: pb.Event) -> ChoiceFinished:
    done = event.choice_finished
    return ChoiceFinished(event.attempt_id, done.choice, word(FinishReason, done.finish, "choice_finished.finish"))


def _read_finished(event: pb.Event) -> Finished:
    done = event.finished
    return Finished(event.attempt_id, done.cached_tokens, done.local_prefill_tokens, done.recomputed_tokens)


def _read_failed(event: pb.Event) -> Failed:
    error = event.failed
    if not error.code:
        raise InvalidRequest("failed.code is empty.", field="failed.code")
    return Failed(event.attempt_id, from_wire(error.code, error.message, error.field if error.HasField("field") else None))


_READ_EVENT: dict[str, Callable[[Any], Event]] = {
    "new_tokens": _read_new_tokens,
    "first_tokens": _read_first_tokens,
    "handed_over": _read_handed_over,
    "choice_finished": _read_choice_finished,
    "movable": lambda event: Movable(event.attempt_id),
    "finished": _read_finished,
    "failed": _read_failed,
}

"""The public call ↔ its messages: exact inverses. Both ends check: a client's mistake is named before anything is sent."""

from __future__ import annotations

from ..core.errors import InvalidRequest
from ..core.generate import MAX_STOP_STRINGS, Chunk, Finish, Generate, Model, Timing, Usage
from ..core.request import FinishReason, Token
from ..core.sampling import SamplingParams
from ..proto import inference_pb2 as pb
from .codec_fields import at_most, chosen, duration, finite, parse, present, word

MAX_REQUEST_ID = 128
MAX_STOP_BYTES = 1024
UINT32, UINT64 = 2**32 - 1, 2**64 - 1
_WHOLE_FIELDS = ("max_tokens", "top_k", "seed", "logprobs", "min_tokens", "n")
_REAL_FIELDS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def encode_generate(call: Generate) -> bytes:
    """Raises `InvalidRequest` naming the field for what the wire cannot carry (a lone surrogate, a negative id)."""
    message = pb.GenerateRequest(model=_text(call.model, "model"), request_id=_text(call.request_id, "request_id"))
    if isinstance(call.prompt, str):
        message.text = _text(call.prompt, "prompt")
    else:
        for token in call.prompt:
            _whole(token, UINT32, "prompt")
        message.token_ids.ids.extend(call.prompt)
        message.token_ids.SetInParent()
    message.stop.extend([_text(stop, "stop") for stop in call.stop])
    message.sampling.CopyFrom(_sampling(call.sampling))
    return message.SerializeToString()


def _text(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{field} is not valid Unicode: a lone surrogate at character {error.start}.", field=field) from None
    return text


def _whole(value: int | None, high: int, field: str) -> int | None:
    if value is not None and not 0 <= value <= high:
        raise InvalidRequest(f"{field} must be between 0 and {high}, not {value}.", field=field)
    return value


def _sampling(sampling: SamplingParams) -> pb.Sampling:
    for token in sampling.stop_token_ids:
        _whole(token, UINT32, "stop_token_ids")
    for token, bias in sampling.logit_bias:
        _whole(token, UINT32, "logit_bias")
        finite(bias, "logit_bias")
    return pb.Sampling(
        max_tokens=_whole(sampling.max_tokens, UINT32, "max_tokens"),
        temperature=finite(sampling.temperature, "temperature"),
        top_p=finite(sampling.top_p, "top_p"),
        top_k=_whole(sampling.top_k, UINT32, "top_k"),
        seed=_whole(sampling.seed, UINT64, "seed"),
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=_whole(sampling.logprobs, UINT32, "logprobs"),
        min_p=finite(sampling.min_p, "min_p"),
        repetition_penalty=finite(sampling.repetition_penalty, "repetition_penalty"),
        presence_penalty=finite(sampling.presence_penalty, "presence_penalty"),
        frequency_penalty=finite(sampling.frequency_penalty, "frequency_penalty"),
        logit_bias=dict(sampling.logit_bias),
        min_tokens=_whole(sampling.min_tokens, UINT32, "min_tokens"),
        n=_whole(sampling.n, UINT32, "n"),
    )


def decode_generate(data: bytes) -> Generate:
    message = parse(pb.GenerateRequest, data)
    prompt = message.text if chosen(message, "prompt") == "text" else tuple(message.token_ids.ids)
    if not prompt:
        raise InvalidRequest("prompt is empty.", field="prompt")
    at_most(MAX_STOP_STRINGS, message.stop, "stop")
    for stop in message.stop:
        if not stop or len(stop.encode()) > MAX_STOP_BYTES:
            raise InvalidRequest(f"A stop string must have between 1 and {MAX_STOP_BYTES} bytes.", field="stop")
    at_most(MAX_REQUEST_ID, message.request_id, "request_id")
    return Generate(
        prompt=prompt,
        model=message.model,
        sampling=_read_sampling(message.sampling),
        stop=tuple(message.stop),
        request_id=message.request_id,
    )


def _read_sampling(message: pb.Sampling) -> SamplingParams:
    """What the client did not set gets the default of `SamplingParams`."""
    given = {name: getattr(message, name) for name in _WHOLE_FIELDS if message.HasField(name)}
    given |= {name: finite(getattr(message, name), name) for name in _REAL_FIELDS if message.HasField(name)}
    return SamplingParams(
        **given,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=tuple((token, finite(bias, "logit_bias")) for token, bias in sorted(message.logit_bias.items())),
    )


def encode_chunk(chunk: Chunk) -> bytes:
    message = pb.GenerateResponse(
        request_id=chunk.request_id,
        text=chunk.text,
        tokens=[_token(token) for token in chunk.tokens],
        choice=chunk.choice,
        reason=chunk.reason or "",
    )
    if chunk.finish is not None:
        message.finish.CopyFrom(_finish(chunk.finish))
    return message.SerializeToString()


def _token(token: Token) -> pb.OutputToken:
    top = [pb.TopLogprob(id=top_id, logprob=logprob) for top_id, logprob in token.top]
    return pb.OutputToken(id=token.id, logprob=token.logprob, top=top, index=token.index, choice=token.choice)


def _finish(finish: Finish) -> pb.Finish:
    usage, timing = finish.usage, finish.timing
    return pb.Finish(
        usage=pb.Usage(prompt_tokens=usage.prompt_tokens, output_tokens=usage.output_tokens, cached_tokens=usage.cached_tokens),
        timing=pb.Timing(
            ttft=timing.ttft,
            tpot=timing.tpot,
            handover_gap=timing.handover_gap,
            kv_bytes=timing.kv_bytes,
            transfer_seconds=timing.transfer_seconds,
            transport=timing.transport,
            prefill_worker=timing.prefill_worker,
            decode_worker=timing.decode_worker,
            attempts=timing.attempts,
        ),
    )


def decode_chunk(data: bytes) -> Chunk:
    message = parse(pb.GenerateResponse, data)
    return Chunk(
        request_id=message.request_id,
        text=message.text,
        tokens=tuple(_read_token(token) for token in message.tokens),
        finish=_read_finish(message.finish) if message.HasField("finish") else None,
        choice=message.choice,
        reason=word(FinishReason, message.reason, "reason") if message.reason else None,
    )


def _read_token(message: pb.OutputToken) -> Token:
    return Token(
        index=message.index,
        id=message.id,
        logprob=message.logprob if message.HasField("logprob") else None,
        top=tuple((top.id, top.logprob) for top in message.top),
        choice=message.choice,
    )


def _read_finish(message: pb.Finish) -> Finish:
    present(message, "usage", "finish.usage")
    present(message, "timing", "finish.timing")
    usage, timing = message.usage, message.timing
    return Finish(
        usage=Usage(usage.prompt_tokens, usage.output_tokens, usage.cached_tokens),
        timing=Timing(
            ttft=duration(timing.ttft, "timing.ttft"),
            tpot=duration(timing.tpot, "timing.tpot") if timing.HasField("tpot") else None,
            handover_gap=duration(timing.handover_gap, "timing.handover_gap") if timing.HasField("handover_gap") else None,
            kv_bytes=timing.kv_bytes,
            transfer_seconds=duration(timing.transfer_seconds, "timing.transfer_seconds"),
            transport=timing.transport,
            prefill_worker=timing.prefill_worker,
            decode_worker=timing.decode_worker,
            attempts=timing.attempts,
        ),
    )


def encode_models(models: tuple[Model, ...]) -> bytes:
    return pb.ListModelsResponse(
        models=[
            pb.Model(id=model.id, max_context=model.max_context, vocab_size=model.vocab_size, has_chat_template=model.has_chat_template)
            for model in models
        ]
    ).SerializeToString()


def decode_models(data: bytes) -> tuple[Model, ...]:
    models = parse(pb.ListModelsResponse, data).models
    return tuple(Model(model.id, model.max_context, model.vocab_size, model.has_chat_template) for model in models)

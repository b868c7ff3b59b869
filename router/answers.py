"""OpenAI's answer formats: what a stream of chunks looks like as `text_completion` and as `chat.completion`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from ..core.errors import DiptychError, NotFound
from ..core.generate import Chunk, Finish, Timing, Usage
from ..core.request import FinishReason, Token
from .text import Detokeniser, Text

Json = dict[str, Any]


@dataclass(slots=True)
class Whole:
    """One choice as it came together. `reason` is there when it is complete."""

    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    reason: FinishReason | None = None

    def take(self, chunk: Chunk) -> None:
        self.texts.append(chunk.text)
        self.tokens.extend(chunk.tokens)
        self.reason = chunk.reason or self.reason

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Answer(Protocol):
    """One answer's format. A stream is `opening`, a `piece` per chunk (some are empty), and the usage if asked for."""

    def opening(self) -> list[Json]: ...

    def pieces(self, chunk: Chunk) -> list[Json]: ...

    def usage(self, usage: Usage) -> Json: ...

    def whole(self, choices: Sequence[Whole], finish: Finish) -> Json: ...


@dataclass(slots=True)
class StreamUsage:
    """What a stream with usage says of it before its last event: null, or if `running` the tokens so far."""

    prompt_tokens: int
    running: bool = False
    written: int = 0

    def behind(self, tokens: int) -> Json:
        """The field of an event that carries `tokens` more."""
        self.written += tokens
        return {"usage": usage_json(Usage(self.prompt_tokens, self.written)) if self.running else None}


class _Envelope:
    """What all messages of one answer share."""

    def __init__(self, kind: str, answer_id: str, model: str, created: int, usage: StreamUsage | None) -> None:
        self._fixed: Json = {"id": answer_id, "object": kind, "created": created, "model": model}
        self._usage = usage

    def choice(self, index: int, choice: Json, tokens: int = 0) -> Json:
        """`tokens`: how many it carries."""
        usage = self._usage.behind(tokens) if self._usage else {}
        return {**self._fixed, "choices": [{"index": index, **choice}], **usage}

    def tells(self, tokens: int) -> bool:
        """Whether `tokens` are worth an event though no text is complete with them: who counts tokens wants to see when they come."""
        return tokens > 0 and self._usage is not None and self._usage.running

    def last(self, usage: Usage, choices: list[Json]) -> Json:
        return {**self._fixed, "choices": choices, "usage": usage_json(usage)}


class CompletionAnswer:
    def __init__(
        self, text: Text, *, answer_id: str, model: str, created: int, choices: int, logprobs: bool, usage: StreamUsage | None
    ) -> None:
        self._envelope = _Envelope("text_completion", f"cmpl-{answer_id}", model, created, usage)
        self._text = text
        self._logprobs = logprobs
        self._offsets = [_Offsets(text.decoder()) for _ in range(choices)]

    def opening(self) -> list[Json]:
        return []

    def pieces(self, chunk: Chunk) -> list[Json]:
        logprobs = self._logprobs_of(chunk.choice, chunk.tokens)
        tokens = len(chunk.tokens)
        if not chunk.text and not chunk.reason and not (logprobs and tokens) and not self._envelope.tells(tokens):
            return []
        choice = {"text": chunk.text, "logprobs": logprobs, "finish_reason": chunk.reason}
        return [self._envelope.choice(chunk.choice, choice, tokens)]

    def usage(self, usage: Usage) -> Json:
        return self._envelope.last(usage, [])

    def whole(self, choices: Sequence[Whole], finish: Finish) -> Json:
        return self._envelope.last(finish.usage, [self._whole(index, choice) for index, choice in enumerate(choices)])

    def _whole(self, index: int, choice: Whole) -> Json:
        logprobs = self._logprobs_of(index, choice.tokens)
        return {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.reason}

    def _logprobs_of(self, choice: int, tokens: Sequence[Token]) -> Json | None:
        if not self._logprobs:
            return None
        return {
            "tokens": [_shown(self._text.token_bytes(token.id)) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [self._offsets[choice].next(token) for token in tokens],
        }

    def _top(self, token: Token) -> Json:
        """The likeliest tokens, and the one drawn even if it is not among them."""
        pairs = [*token.top, (token.id, token.logprob)] if token.id not in (i for i, _ in token.top) else token.top
        return {_shown(self._text.token_bytes(token_id)): logprob for token_id, logprob in pairs}


class _Offsets:
    """Where in a choice's text each of its tokens begins, in characters."""

    def __init__(self, decoder: Detokeniser) -> None:
        self._decoder = decoder
        self._length = 0

    def next(self, token: Token) -> int:
        offset = self._length
        self._length += len(self._decoder.push(token.id))
        return offset


class ChatAnswer:
    def __init__(
        self, text: Text, *, answer_id: str, model: str, created: int, choices: int, logprobs: bool, usage: StreamUsage | None
    ) -> None:
        name = f"chatcmpl-{answer_id}"
        self._stream = _Envelope("chat.completion.chunk", name, model, created, usage)
        self._one = _Envelope("chat.completion", name, model, created, None)
        self._text = text
        self._choices = choices
        self._logprobs = logprobs

    def opening(self) -> list[Json]:
        return [self._delta(choice, {"role": "assistant", "content": ""}, None) for choice in range(self._choices)]

    def pieces(self, chunk: Chunk) -> list[Json]:
        pieces = []
        logprobs = self._logprobs_of(chunk.tokens) if chunk.tokens else None
        tokens = len(chunk.tokens)
        if chunk.text or logprobs or self._stream.tells(tokens):
            pieces.append(self._delta(chunk.choice, {"content": chunk.text}, None, logprobs, tokens))
            tokens = 0
        if chunk.reason:
            pieces.append(self._delta(chunk.choice, {}, chunk.reason, tokens=tokens))
        return pieces

    def usage(self, usage: Usage) -> Json:
        return self._stream.last(usage, [])

    def whole(self, choices: Sequence[Whole], finish: Finish) -> Json:
        return self._one.last(finish.usage, [self._whole(index, choice) for index, choice in enumerate(choices)])

    def _whole(self, index: int, choice: Whole) -> Json:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs_of(choice.tokens), "finish_reason": choice.reason}

    def _delta(self, choice: int, delta: Json, reason: FinishReason | None, logprobs: Json | None = None, tokens: int = 0) -> Json:
        return self._stream.choice(choice, {"delta": delta, "logprobs": logprobs, "finish_reason": reason}, tokens)

    def _logprobs_of(self, tokens: Sequence[Token]) -> Json | None:
        if not self._logprobs:
            return None
        return {"content": [{**self._entry(t.id, t.logprob), "top_logprobs": [self._entry(*pair) for pair in t.top]} for t in tokens]}

    def _entry(self, token_id: int, logprob: float | None) -> Json:
        data = self._text.token_bytes(token_id)
        return {"token": _shown(data), "logprob": logprob, "bytes": list(data)}


def usage_json(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def timing_json(timing: Timing) -> Json:
    """Our own field, for clients that ask for it with a header: `core.generate.Timing` as it is."""
    return asdict(timing)


def error_json(error: DiptychError) -> Json:
    """OpenAI's error body; `param` is the field the error is about."""
    kind = "server_error" if error.http_status >= 500 else "rate_limit_error" if error.http_status == 429 else "invalid_request_error"
    code = "model_not_found" if isinstance(error, NotFound) and error.field == "model" else error.code
    return {"error": {"message": error.message, "type": kind, "param": error.field, "code": code}}


def _shown(data: bytes) -> str:
    """A token as text; one that is no whole characters as OpenAI writes it."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

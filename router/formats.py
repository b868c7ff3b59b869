"""What the HTTP face answers, as pydantic states it in the OpenAPI document. The answers themselves are written in `answers` and
`http`; a test holds every one of them against these."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from ..core.generate import Timing
from ..core.request import FinishReason

Count = Annotated[int, Field(ge=0)]


class _Format(BaseModel):
    """A field that may be absent has a default; one that may be null says so in its type."""

    model_config = ConfigDict(extra="forbid")


class CachedTokens(_Format):
    cached_tokens: Count = Field(description="Tokens of the prompt whose KV was in a cache already.")


class UsageFormat(_Format):
    prompt_tokens: Count
    completion_tokens: Count = Field(description="Of all choices together.")
    total_tokens: Count
    prompt_tokens_details: CachedTokens


class _Envelope(_Format):
    id: str
    created: int = Field(description="Unix time, in seconds.")
    model: str


class _Whole(_Envelope):
    usage: UsageFormat
    timing: Timing | SkipJsonSchema[None] = Field(None, description="If asked for with the header x-diptych-timing.")


class _Event(_Envelope):
    """An event of a stream. `usage`: absent, null or the usage so far, as `stream_options` asks; the last event with it has no choices."""

    usage: UsageFormat | None = None
    timing: Timing | SkipJsonSchema[None] = Field(None, description="Beside the last usage, if asked for with the header x-diptych-timing.")


class CompletionLogprobs(_Format):
    """One entry per token, in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None]]
    text_offset: list[Count] = Field(description="Where the token's text begins in the answer's, in characters.")


class CompletionChoice(_Format):
    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class CompletionEventChoice(CompletionChoice):
    finish_reason: FinishReason | None  # type: ignore[assignment]  # null until the choice's last event


class Completion(_Whole):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class CompletionEvent(_Event):
    object: Literal["text_completion"]
    choices: list[CompletionEventChoice]


class LikelyToken(_Format):
    token: str
    logprob: float | None
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class ChatToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(_Format):
    content: list[ChatToken]


class ChatMessage(_Format):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Format):
    index: Count
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatDelta(_Format):
    role: Literal["assistant"] | SkipJsonSchema[None] = None
    content: str | SkipJsonSchema[None] = None


class ChatEventChoice(_Format):
    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class Chat(_Whole):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatEvent(_Event):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatEventChoice]


class ErrorDetail(_Format):
    message: str = Field(description="A sentence for a person.")
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="The field that is wrong, by its path; `body` if it is no JSON object at all.")
    code: str | None = Field(description="What went wrong, for a program.")


class ErrorFormat(_Format):
    error: ErrorDetail


class ModelFormat(_Format):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: Count = Field(description="The context's length in tokens, prompt and output together.")


class ModelList(_Format):
    object: Literal["list"]
    data: list[ModelFormat]


class Healthy(_Format):
    status: Literal["ok"]


class Unhealthy(_Format):
    status: Literal["unavailable"]
    reason: str


FORMATS: tuple[type[BaseModel], ...] = (
    Completion,
    CompletionEvent,
    Chat,
    ChatEvent,
    ErrorFormat,
    ModelFormat,
    ModelList,
    Healthy,
    Unhealthy,
)

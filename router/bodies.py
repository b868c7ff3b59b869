"""The HTTP bodies we accept: OpenAI's schema, strict. An unknown field, or a known one we do not serve, is refused by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..core.errors import InvalidRequest
from ..core.generate import Generate
from ..core.sampling import Range, SamplingParams
from .admission import check_unicode

_COMMON_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields of OpenAI's schema that we do not serve, with the values that ask for nothing (null always does)."""

IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""Fields that ask for nothing whatever they hold."""

_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")


def _only_false(value: bool) -> bool:
    if value:
        raise ValueError("is not supported; leave it out or set it to false")
    return value


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = Field(False, description="Whether one event before the last has the usage.")
    continuous_usage_stats: bool = Field(False, description="With `include_usage`: whether every event has the usage so far.")
    include_obfuscation: Annotated[bool, AfterValidator(_only_false), Field(json_schema_extra={"const": False})] = Field(
        False, description="Not served."
    )


def _strings(value: object) -> object:
    return [] if value is None else [value] if isinstance(value, str) else value


def _bias(value: object) -> object:
    """JSON's keys are texts; ours are token ids, written in the one plain way, so that no two are the same."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and numbers")
    if any(not _TOKEN_ID.fullmatch(key) for key in value):
        raise ValueError("its keys must be token ids")
    return {int(key): bias for key, bias in value.items()}


class _Body(BaseModel):
    """Fields that both calls share. `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos`, `stop_token_ids` and
    `continuous_usage_stats` are not OpenAI's but vLLM's."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str = Field("", description="The served model's name; empty means it too.")
    max_tokens: int | None = Field(
        None, description="The most tokens of output. What does not fit the context behind the prompt ends sooner."
    )
    n: int = Field(1, description="How many choices to write, each by itself.")
    temperature: float = Field(1.0, description="Divides the logits; 0 is greedy.")
    top_p: float = Field(1.0, description="Only the likeliest tokens that make up this probability together.")
    top_k: int = Field(0, description="Only this many of the likeliest tokens; 0 is no limit.")
    seed: int | None = Field(None, description="The same seed draws the same tokens; without one the router draws one.")
    stop: Annotated[list[str], BeforeValidator(_strings)] = Field([], description="Texts that end the output and are not part of it.")
    stop_token_ids: list[int] = Field([], description="Tokens that end the output.")
    ignore_eos: bool = Field(False, description="Whether the model's own end tokens are tokens like others.")
    min_p: float = Field(0.0, description="Only tokens at least this share as likely as the likeliest; 0 is no limit.")
    repetition_penalty: float = Field(1.0, description="Divides positive logits, multiplies negative ones, of tokens in prompt and output.")
    presence_penalty: float = Field(0.0, description="Taken off the logit of every token the output holds.")
    frequency_penalty: float = Field(0.0, description="Taken off a token's logit for every time the output holds it.")
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias)] = Field({}, description="Token ids, and what is added to their logits.")
    min_tokens: int = Field(0, description="Before this many tokens only `max_tokens` ends the output.")
    stream: bool = Field(False, description="Whether the answer comes as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="What a stream tells beside the text.")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def running_usage(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def check_limits(self, longest: int) -> None:
        """Each limit on the output for itself: what a context of `longest` tokens could never hold is refused by its name."""
        for field, low in (("max_tokens", 1), ("max_completion_tokens", 1), ("min_tokens", 0)):
            if (value := getattr(self, field, None)) is not None:
                Range(low, longest).check(field, value)

    def generate(self, prompt: str | tuple[int, ...], request_id: str, *, max_tokens: int, logprobs: int | None) -> Generate:
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(sorted(self.logit_bias.items())),
            min_tokens=min(self.min_tokens, max_tokens),
            n=self.n,
        )
        return Generate(prompt, self.model, sampling, tuple(self.stop), request_id)


def _one_prompt(value: object) -> object:
    """A prompt may be text, token ids, or a list of one of these."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be text or a list of token ids")
    if any(isinstance(item, str | list) for item in value):
        raise ValueError("only one prompt per request is supported")
    if any(type(item) is not int for item in value):
        raise ValueError("token ids must be integers")
    return tuple(value)


class CompletionBody(_Body):
    """`/v1/completions`."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {**_COMMON_NEUTRAL, "best_of": (1,), "echo": (False,), "suffix": ("",)}
    prompt: Annotated[str | tuple[int, ...], BeforeValidator(_one_prompt)] = Field(
        description="Text, token ids, or a list of exactly one of these."
    )
    logprobs: int | None = Field(None, description="How many of the likeliest tokens to tell beside each one drawn.")


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


def _parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _without_nulls(value: object) -> object:
    """Clients send an answer's message back as it came, with its empty fields."""
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_parts)]


class ChatBody(_Body):
    """`/v1/chat/completions`."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **_COMMON_NEUTRAL,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
    }
    messages: Annotated[list[Annotated[Message, BeforeValidator(_without_nulls)]], Field(min_length=1)] = Field(
        description="The conversation so far, as the model's chat template takes it."
    )
    max_completion_tokens: int | None = Field(None, description="`max_tokens` under its new name; this one counts if both are there.")
    logprobs: bool = Field(False, description="Whether to tell how likely each token was.")
    top_logprobs: int | None = Field(None, description="With `logprobs`: how many of the likeliest tokens to tell beside each one drawn.")

    @property
    def limit(self) -> int | None:
        """The output limit under its new or its old name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def logprob_count(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true.", field="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def plain_messages(self) -> list[dict[str, str]]:
        """As chat templates read them."""
        return [{"role": message.role, "content": "".join(part.text for part in message.content)} for message in self.messages]


_B = TypeVar("_B", CompletionBody, ChatBody)


def parse_body(kind: type[_B], raw: bytes) -> _B:
    """The validated body; `InvalidRequest` names the first field that is wrong (`body` if it is no JSON object at all)."""
    values = _json_object(raw)
    _check_unicode(values, raw)
    _drop_neutral(values, kind.neutral)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _named(error, kind) from None


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        values = json.loads(raw.decode("utf-8"), parse_float=_number)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not valid UTF-8: byte {error.start}.", field="body") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}", field="body") from None
    if not isinstance(values, dict):
        raise InvalidRequest("The body must be a JSON object.", field="body")
    return values


def _number(text: str) -> float:
    """JSON knows one kind of number: 1.0 is an integer."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _check_unicode(values: dict[str, Any], raw: bytes) -> None:
    """JSON can write lone surrogates, as escapes; nothing behind us can take them."""
    if b"\\ud" in raw or b"\\uD" in raw:
        for name, value in values.items():
            check_unicode(json.dumps({name: value}, ensure_ascii=False), name)


def _drop_neutral(values: dict[str, Any], neutral: Mapping[str, tuple[object, ...]]) -> None:
    for name in [name for name in values if values[name] is None or name in IGNORED]:
        del values[name]
    for name in [name for name in values if name in neutral]:
        given = values.pop(name)
        if not any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in neutral[name]):
            only = " or ".join(json.dumps(value) for value in neutral[name])
            raise InvalidRequest(f"{name} is not supported; leave it out or set it to {only}.", field=name)


def _named(error: ValidationError, kind: type[BaseModel]) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    location = [str(part) for part in first["loc"]]
    # Behind the name of a union's field pydantic adds the branch it tried.
    path = location[0] if kind is CompletionBody and location[0] == "prompt" else ".".join(location)
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"{path}: unknown field.", field=path)
    if first["type"] == "missing":
        return InvalidRequest(f"{path} is required.", field=path)
    message = first["msg"].removeprefix("Value error, ")
    given = f" (got {first['input']!r})" if isinstance(first["input"], int | float | bool) else ""
    return InvalidRequest(f"{path}: {message[0].lower()}{message[1:]}{given}"[:500] + ".", field=path)

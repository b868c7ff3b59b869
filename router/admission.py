"""What is refused before anything is spent on it. Pure: values in, `InvalidRequest` (naming the field) out."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import ContextExceeded, InvalidRequest, NotFound
from ..core.generate import MAX_STOP_STRINGS, Generate
from ..core.model import ModelCard
from ..core.request import MAX_REQUEST_ID
from ..core.sampling import Range

MAX_STOP_CHARACTERS = 256


def check_call(call: Generate, card: ModelCard, model_name: str) -> None:
    """All that can be known without the prompt's tokens."""
    check_model(call.model, model_name)
    call.sampling.validate(card.vocab_size)
    Range(1, card.max_context).check("max_tokens", call.sampling.max_tokens)
    _check_stop(call.stop)
    if len(call.request_id) > MAX_REQUEST_ID or not (call.request_id.isascii() and call.request_id.isprintable()):
        raise InvalidRequest(f"request_id must be at most {MAX_REQUEST_ID} printable ASCII characters.", field="request_id")
    if not call.prompt:
        raise InvalidRequest("prompt is empty.", field="prompt")
    if not isinstance(call.prompt, str):
        _check_ids(call.prompt, card)


def check_model(name: str, served: str) -> None:
    """An empty name means the one that is served."""
    if name and name != served:
        raise NotFound(f"There is no model {name[:200]!a} here; this cluster serves {served!r}.", field="model")


def check_prompt(prompt_tokens: int, card: ModelCard) -> None:
    """The prompt must leave room for one token of output, and must not be empty."""
    if not prompt_tokens:
        raise InvalidRequest("prompt is empty.", field="prompt")
    if prompt_tokens >= card.max_context:
        raise ContextExceeded(
            # Clients know the error by OpenAI's words.
            f"This model's maximum context length is {card.max_context} tokens, output included; the prompt has {prompt_tokens} tokens.",
            field="prompt",
        )


def room(prompt_tokens: int, card: ModelCard, capacity: int | None) -> int:
    """Output tokens that still fit behind the prompt, in the model's context and in the largest pool (None: not known yet). At
    least 1: what does not fit at all is refused with its numbers by `check_prompt` and by placement."""
    return max(1, min(card.max_context, capacity or card.max_context) - prompt_tokens)


def check_unicode(text: str, field: str) -> None:
    """Raise `InvalidRequest` if `text` holds a lone surrogate, which no UTF-8 can say."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{field!a} holds a lone surrogate (U+{ord(text[error.start]):04X}), which is not valid Unicode.", field=field
        ) from None


def _check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop has {len(stop)} strings; the limit is {MAX_STOP_STRINGS}.", field="stop")
    for string in stop:
        check_unicode(string, "stop")
        if not 1 <= len(string) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(f"A stop string must have 1 to {MAX_STOP_CHARACTERS} characters, not {len(string)}.", field="stop")


def _check_ids(ids: Sequence[int], card: ModelCard) -> None:
    low, high = min(ids), max(ids)
    if low < 0 or high >= card.vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequest(f"prompt holds token id {wrong}; the vocabulary has ids 0 to {card.vocab_size - 1}.", field="prompt")

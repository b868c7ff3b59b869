"""Chat templates: Jinja, sandboxed, with what Hugging Face templates expect to find."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ..core.errors import InvalidRequest, ModelError
from ..core.model import ModelCard


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012  jinja2 reads it from the class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Renders messages to the text the model was trained on; `bos_token` and `eos_token` are the tokenizer's."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        """Raises `ModelError` if `source` is not a template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], autoescape=False
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ModelError(f"The chat template is not valid: {error}") from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    @classmethod
    def load(cls, path: Path, tokenizer: Tokenizer, card: ModelCard) -> ChatTemplate:
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        eos = card.eos_token_ids[0] if card.eos_token_ids else None
        return cls(source, bos_token=_name(tokenizer, card.bos_token_id), eos_token=_name(tokenizer, eos))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt for the assistant's next message; what the template refuses is an `InvalidRequest` about `messages`."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._tokens)
        except SecurityError as error:
            raise ModelError(f"The chat template does what is not allowed: {error}") from error
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, LookupError) as error:
            raise InvalidRequest(f"The chat template refused the messages: {error}", field="messages") from error


def _name(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.id_to_token(token_id) or ""


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Unlike Jinja's own, leaves < > & as they are: the result is a prompt, not HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)

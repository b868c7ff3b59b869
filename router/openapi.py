"""The OpenAPI document of the HTTP face: from the body models, the sampler's ranges, the answers' formats and the served model's card.

What it says of a body is what the server accepts: a body it calls valid is refused only for what no schema can say (a prompt longer
than the context or than any pool, text that is no Unicode, messages that the model's chat template refuses). A test holds the two
against each other.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ..core.generate import MAX_STOP_STRINGS
from ..core.model import ModelCard
from ..core.sampling import BIAS, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, RANGES, Range
from .admission import MAX_STOP_CHARACTERS
from .bodies import IGNORED, ChatBody, CompletionBody
from .formats import FORMATS

Schema = dict[str, Any]

_ERRORS = {
    400: "A field is missing, unknown or out of range, or the prompt can never fit.",
    401: "The router wants an API key, and there is none, or no good one.",
    404: "There is no such model.",
    413: "The body is larger than the router takes.",
    429: "The router has as many requests as it takes at once.",
    500: "A defect; the router's log has it.",
    503: "No worker can take the request now, or the router is shutting down.",
    504: "The request had not ended within the router's limit.",
}
_AGAIN = (429, 503)
"""Worth trying again, and answered with Retry-After."""
_LIMITS = ("max_tokens", "max_completion_tokens", "min_tokens")
_NULL = {"type": "null"}


def document(card: ModelCard, name: str, *, chat: bool, running: int, keys: bool = False) -> Schema:
    """The OpenAPI 3.1 document of a router that serves the model `card` as `name`. `chat`: whether it has a chat template; `running`:
    how many choices it writes at once; `keys`: whether it wants API keys."""
    schemas = _schemas([*FORMATS, CompletionBody, *([ChatBody] if chat else [])])
    _state_body(schemas, CompletionBody, card, name, running)
    schemas["CompletionBody"]["properties"]["prompt"] |= _prompt(card)
    paths = {"/v1/completions": {"post": _generation("createCompletion", "Continue a prompt.", "Completion")}}
    if chat:
        _state_body(schemas, ChatBody, card, name, running)
        _state_messages(schemas)
        paths["/v1/chat/completions"] = {"post": _generation("createChatCompletion", "Answer a conversation.", "Chat")}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Diptych",
            "version": "1",
            "description": "OpenAI's completions, chat completions and models, for one model. Every error has OpenAI's body, also that "
            "of a path (404) or method (405) not listed here.",
        },
        "paths": {**paths, **_lookups(name)},
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}] if keys else [],
    }


def _schemas(models: list[type[BaseModel]]) -> dict[str, Schema]:
    _, found = models_json_schema([(model, "validation") for model in models], ref_template="#/components/schemas/{model}")
    schemas: dict[str, Schema] = found["$defs"]
    for schema in schemas.values():
        schema.pop("title", None)
        for field in schema.get("properties", {}).values():
            field.pop("title", None)
            if field.get("default", 0) is None:
                del field["default"]
    return schemas


def _state_body(schemas: dict[str, Schema], kind: type[CompletionBody] | type[ChatBody], card: ModelCard, name: str, running: int) -> None:
    """Write down what pydantic does not know: ranges, the fields that are accepted and not served, and that null is the same as nothing."""
    body = schemas[kind.__name__]
    fields: dict[str, Schema] = body["properties"]
    for field, schema in fields.items():
        _drop_null(schema)
        if field in RANGES and schema["type"] != "boolean":
            schema |= _numbers(RANGES[field])
        elif field == "top_logprobs":
            schema |= _numbers(RANGES["logprobs"])
        if field in _LIMITS:
            schema |= {"minimum": 0 if field == "min_tokens" else 1, "maximum": card.max_context}
    fields["model"]["enum"] = ["", name]
    fields["n"]["maximum"] = min(fields["n"]["maximum"], running)
    fields["stop"] = {key: fields["stop"][key] for key in ("description", "default")} | _stop()
    fields["stop_token_ids"] |= {"items": _token_id(card), "maxItems": MAX_STOP_TOKEN_IDS}
    fields["logit_bias"] |= {
        "patternProperties": {f"^({below(card.vocab_size)})$": {"type": "number", **_numbers(BIAS)}},
        "additionalProperties": False,
        "maxProperties": MAX_LOGIT_BIAS,
    }
    for field, values in kind.neutral.items():
        fields[field] = {"description": "Not served: only what asks for nothing.", "enum": [*values]}
    for field in IGNORED:
        fields[field] = {"description": "Accepted and not used."}
    for field in fields.keys() - set(body["required"]):
        _allow_null(fields[field])
    body["additionalProperties"] = _NULL


def _prompt(card: ModelCard) -> Schema:
    text = {"type": "string", "minLength": 1}
    ids = {"type": "array", "items": _token_id(card), "minItems": 1, "maxItems": card.max_context - 1}
    only = {"type": "array", "items": {"anyOf": [text, ids]}, "minItems": 1, "maxItems": 1}
    return {"anyOf": [text, ids, only]}


def _state_messages(schemas: dict[str, Schema]) -> None:
    body, message = schemas["ChatBody"], schemas["Message"]
    message["additionalProperties"] = _NULL
    message["properties"]["content"] = {
        "description": "Text, or parts of text that are put together.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"$ref": "#/components/schemas/TextPart"}}],
    }
    # top_logprobs needs logprobs.
    counted = {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]}
    body["anyOf"] = [counted, {"properties": {"top_logprobs": _NULL}}]


def _stop() -> Schema:
    text = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
    return {"anyOf": [text, {"type": "array", "items": text, "maxItems": MAX_STOP_STRINGS}]}


def _token_id(card: ModelCard) -> Schema:
    return {"type": "integer", "minimum": 0, "maximum": card.vocab_size - 1}


def _numbers(allowed: Range) -> Schema:
    return {"exclusiveMinimum" if allowed.open_low else "minimum": allowed.low, "maximum": allowed.high}


def _drop_null(schema: Schema) -> None:
    """`X | None` as X alone, in place."""
    branches = [branch for branch in schema.get("anyOf", ()) if branch != _NULL]
    if len(branches) == 1:
        del schema["anyOf"]
        schema |= branches[0]


def _allow_null(schema: Schema) -> None:
    """Let a field be null, in place."""
    if "type" in schema:
        schema["type"] = [schema["type"], "null"]
    if "enum" in schema:
        schema["enum"] = [*schema["enum"], None]
    elif "anyOf" in schema:
        schema["anyOf"] = [*schema["anyOf"], _NULL]
    elif "$ref" in schema:
        schema["anyOf"] = [{"$ref": schema.pop("$ref")}, _NULL]


def below(limit: int) -> str:
    """A regular expression of the decimal numbers from 0 to `limit` - 1, without leading zeros."""
    top = str(limit - 1)
    shorter = ["[0-9]"] if len(top) > 1 else []
    shorter += [f"[1-9][0-9]{{{length - 1}}}" for length in range(2, len(top))]
    same = []
    for i, digit in enumerate(top):
        low = 1 if i == 0 and len(top) > 1 else 0
        if int(digit) > low:
            same.append(f"{top[:i]}[{low}-{int(digit) - 1}]" + (f"[0-9]{{{len(top) - i - 1}}}" if i + 1 < len(top) else ""))
    return "|".join([*shorter, *same, top])


def _generation(operation: str, summary: str, answer: str) -> Schema:
    body = answer + "Body"
    return {
        "operationId": operation,
        "summary": summary,
        "parameters": [
            {
                "name": "x-diptych-timing",
                "in": "header",
                "description": "With 1 the router's own times come with the usage, or with the whole answer.",
                "schema": {"type": "string"},
            }
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}},
        "responses": {
            "200": {
                "description": "The answer whole, or with `stream` as events: `data: [DONE]` is the last one, unless an error is.",
                "headers": _headers("x-request-id"),
                "content": {
                    "application/json": {"schema": _ref(answer)},
                    "text/event-stream": {"schema": _events(_ref(answer + "Event"))},
                },
            },
            **{str(status): _error(status) for status in _ERRORS},
        },
    }


def _events(event: Schema) -> Schema:
    """One event of a stream."""
    said = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": [event, _ref("ErrorFormat")]}}
    return {"type": "object", "properties": {"data": {"anyOf": [{"const": "[DONE]"}, said]}}, "required": ["data"]}


def _lookups(name: str) -> dict[str, Schema]:
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}, "example": name}
    own = {"description": "This document.", "content": {"application/json": {"schema": {"type": "object"}}}}
    metrics = {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {
        "/v1/models": {"get": _lookup("listModels", "What is served.", {"200": _json("The model.", "ModelList")})},
        "/v1/models/{model}": {
            "get": _lookup("retrieveModel", "One model.", {"200": _json("The model.", "ModelFormat"), "404": _error(404)}),
            "parameters": [model],
        },
        "/health": {
            "get": {
                "operationId": "health",
                "summary": "Whether a request could be served.",
                "responses": {"200": _json("Yes.", "Healthy"), "503": _json("No.", "Unhealthy")},
                "security": [],
            }
        },
        "/live": {
            "get": {
                "operationId": "live",
                "summary": "Whether the router answers, be there workers or not.",
                "responses": {"200": _json("Yes.", "Healthy")},
                "security": [],
            }
        },
        "/metrics": {"get": _lookup("metrics", "All metrics.", {"200": metrics})},
        "/openapi.json": {"get": _lookup("openapi", "This document.", {"200": own})},
    }


def _lookup(operation: str, summary: str, responses: Schema) -> Schema:
    return {"operationId": operation, "summary": summary, "responses": {**responses, "401": _error(401)}}


def _error(status: int) -> Schema:
    names = ["retry-after"] if status in _AGAIN else []
    return _json(_ERRORS[status], "ErrorFormat") | ({"headers": _headers(*names)} if names else {})


def _json(description: str, schema: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": _ref(schema)}}}


def _headers(*names: str) -> Schema:
    meaning = {
        "x-request-id": {"description": "The request's name in the router's log.", "schema": {"type": "string"}},
        "retry-after": {"description": "Seconds after which to try again.", "schema": {"type": "integer", "minimum": 0}},
    }
    return {name: {"required": True, **meaning[name]} for name in names}


def _ref(schema: str) -> Schema:
    return {"$ref": f"#/components/schemas/{schema}"}

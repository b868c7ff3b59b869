"""The OpenAPI document says what the server does: the same routes, the same bodies accepted, the same answers."""

import asyncio
import json
import re

import httpx
import jsonschema
import pytest
from diptych.core.clock import MonotonicClock
from diptych.core.config import LimitsSection
from diptych.core.metrics import NullRecorder
from diptych.core.model import read_card
from diptych.router.bodies import IGNORED, ChatBody, CompletionBody
from diptych.router.http import make_app
from diptych.router.openapi import below, document
from diptych.router.placement import Policy, Snapshot
from diptych.router.service import Service
from diptych.router.text import Text
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.routing import Route

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
BASE = {COMPLETION: {"prompt": "x"}, CHAT: {"messages": [{"role": "user", "content": "x"}]}}
KINDS = {COMPLETION: CompletionBody, CHAT: ChatBody}


def validator(document, reference):
    """For the schema at this place in the document."""
    return jsonschema.Draft202012Validator({"$ref": reference, "components": document["components"]})


class Nobody:
    """A fleet without workers: what is accepted ends as 503."""

    def snapshot(self):
        return Snapshot.of(())


@pytest.fixture(scope="module")
def service(prepared):
    text = Text.load(prepared, read_card(prepared))
    limits = LimitsSection(body_bytes=100_000, running=12)
    yield Service(text, Nobody(), name="tiny", policy=Policy(), limits=limits, recorder=NullRecorder(), clock=MonotonicClock())
    text.close()


@pytest.fixture(scope="module")
def described(service):
    return document(service.text.card, "tiny", chat=True, running=service.limits.running)


@pytest.fixture(scope="module")
def ask(service, described):
    """Send a body: whether it was accepted, and whether the document calls it valid. How long a text is in tokens no document can say."""
    loop = asyncio.new_event_loop()
    client = httpx.AsyncClient(transport=httpx.ASGITransport(make_app(service, lambda: b"")), base_url="http://router")
    valid = {path: validator(described, f"#/components/schemas/{kind.__name__}").is_valid for path, kind in KINDS.items()}

    def sent(path, body):
        answer = loop.run_until_complete(client.post(path, content=json.dumps(body)))
        assert answer.status_code in (400, 404, 503)
        too_long = isinstance(body.get("prompt"), str) and answer.json()["error"]["code"] == "context_length_exceeded"
        return answer.status_code == 503 or too_long, valid[path](body)

    yield sent
    loop.run_until_complete(client.aclose())
    loop.close()


def test_the_document_is_valid(service, described):
    OpenAPIV31SpecValidator(described).validate()
    OpenAPIV31SpecValidator(document(service.text.card, "tiny", chat=False, running=1)).validate()
    for schema in described["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_it_names_every_route_and_no_other(service):
    def paths(chat):
        return {re.sub(r"\{.*\}", "{}", path) for path in document(service.text.card, "tiny", chat=chat, running=1)["paths"]}

    routes = {re.sub(r"\{.*\}", "{}", route.path) for route in make_app(service, lambda: b"").routes if isinstance(route, Route)}
    assert routes == paths(chat=True)
    assert routes - paths(chat=False) == {CHAT}


@pytest.mark.parametrize("name", ["CompletionBody", "ChatBody", "StreamOptions"])
def test_every_field_of_a_body_is_described(described, name):
    fields = described["components"]["schemas"][name]["properties"]
    assert [field for field, schema in fields.items() if not schema.get("description")] == []


def test_numbers_as_a_pattern():
    for limit in (1, 2, 9, 10, 11, 99, 100, 101, 512, 1000, 1234, 2999):
        pattern = re.compile(f"({below(limit)})")
        assert [number for number in range(3000) if pattern.fullmatch(str(number))] == list(range(limit))
        assert not pattern.fullmatch("01")


EDGES = [
    None, True, False, 0, 1, 2, 12, 13, 17, 20, 21, 64, 254, 255, 256, 257, 511, 512, -1, -2, -3, 100, 101, 2**31 - 1, 2**31, 2**64 - 1,
    2**64, 10**400, 0.0, 1.0, 1.5, 0.5, -2.0, -2.5, 2.0, 100.0, 100.5, 1e-9, 1e300, 256.0,
    "", "x", "tiny", "other", "auto", "default", "none", "5", "a" * 256, "a" * 257,
    [], [""], ["x"], ["x"] * 16, ["x"] * 17, ["x", 1], [1], [511], [512], [-1], [1, True], [1, 2.0], [1, 2.5], [None],
    [1] * 64, [1] * 65, [1] * 255, [1] * 256, [[1]], [[]], [["x"]], [[1], [1]], [[512]], ["text"], ["audio"],
    {}, {"5": 1}, {"05": 1}, {"511": -100}, {"512": 1}, {"5": 100.5}, {"5": None}, {"5": True}, {"x": 1}, {"": 1},
    {str(i): 1 for i in range(500)}, {"type": "text"}, {"type": "json_object"}, {"include_usage": True}, {"include_usage": None},
    {"include_usage": 1}, {"include_usage": True, "continuous_usage_stats": True}, {"include_obfuscation": True},
    {"include_obfuscation": False}, {"include_obfuscation": 0}, {"x": None},
]  # fmt: skip
CONTENTS = st.sampled_from(
    [
        "",
        "x",
        None,
        1,
        [],
        [{"type": "text", "text": "x"}],
        [{"type": "text"}],
        [{"type": "image_url", "text": "x"}],
        [{"text": "x"}],
        ["x"],
    ]
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", None, 1])},
    optional={"content": CONTENTS, "name": st.sampled_from([None, "y"]), "refusal": st.none(), "x": st.none()},
)
OTHER_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = {path: sorted([*kind.model_fields, *kind.neutral, *IGNORED, "x"]) for path, kind in KINDS.items()}


def bodies(path):
    changes = st.dictionaries(st.sampled_from(FIELDS[path]), st.sampled_from(EDGES) | OTHER_JSON, max_size=3)
    if path == CHAT:
        changes = st.tuples(changes, st.just({}) | st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=2)})).map(
            lambda both: both[0] | both[1]
        )
    return changes.map(lambda body: (path, {**BASE[path], **body}))


@settings(max_examples=300, deadline=None)
@given(bodies(COMPLETION) | bodies(CHAT))
@example((CHAT, {**BASE[CHAT], "top_logprobs": 3}))
@example((CHAT, {**BASE[CHAT], "top_logprobs": 3, "logprobs": True}))
@example((CHAT, {**BASE[CHAT], "max_tokens": 0, "max_completion_tokens": 5}))
@example((COMPLETION, {"prompt": "x", "max_tokens": 5, "min_tokens": 9}))
@example((COMPLETION, {"prompt": "x" * 200, "max_tokens": 256}))
def test_a_body_is_valid_if_and_only_if_it_is_accepted(ask, asked):
    accepted, valid = ask(*asked)
    assert accepted == valid


@pytest.mark.parametrize("path", [COMPLETION, CHAT])
def test_each_field_at_each_edge(ask, path):
    for field in FIELDS[path]:
        for value in EDGES:
            accepted, valid = ask(path, {**BASE[path], field: value})
            assert accepted == valid, (field, value)


def said(document, response, method="get"):
    """Hold one response against the document: its status, headers, media type and body."""
    path = re.sub("/v1/models/.*", "/v1/models/{model}", response.url.path)
    stated = document["paths"][path][method]["responses"][str(response.status_code)]
    for name, header in stated.get("headers", {}).items():
        assert not header["required"] or name in response.headers
    kind = response.headers["content-type"].partition(";")[0]
    schema = stated["content"][kind]["schema"]
    if kind == "application/json":
        body = response.json()
        if "$ref" in schema:
            validator(document, schema["$ref"]).validate(body)
    elif kind == "text/event-stream":
        branch = schema["properties"]["data"]["anyOf"][1]["contentSchema"]["anyOf"][0]["$ref"]
        *events, end = [event.removeprefix("data: ") for event in response.text.split("\n\n")[:-1]]
        assert end == "[DONE]"
        for event in events:
            validator(document, branch).validate(json.loads(event))
    return response.status_code


def test_every_answer_is_as_the_document_says(site, described):
    asked = [
        (COMPLETION, {"prompt": "x" * 20, "max_tokens": 4}),
        (COMPLETION, {"prompt": [[1, 300]], "max_tokens": 4, "logprobs": 2}),
        (CHAT, BASE[CHAT] | {"max_tokens": 4}),
        (CHAT, BASE[CHAT] | {"max_tokens": 4, "logprobs": True, "top_logprobs": 2}),
    ]
    usage: dict[str, bool] = {"include_usage": True}
    streams = [{}, {"stream": True}, *({"stream": True, "stream_options": o} for o in (usage, usage | {"continuous_usage_stats": True}))]

    async def check():
        async with site(limits=LimitsSection(body_bytes=1024)) as s, httpx.AsyncClient(base_url=s.url) as c:
            for path, body in asked:
                for stream in streams:
                    for headers in ({}, {"x-diptych-timing": "1"}):
                        answer = await c.post(path, json=body | stream, headers=headers)
                        assert said(described, answer, "post") == 200
                        assert ("timing" in answer.text) == (bool(headers) and stream != {"stream": True})
            for path in ("/v1/models", "/v1/models/tiny", "/health", "/live", "/metrics", "/openapi.json"):
                assert said(described, await c.get(path)) == 200
            assert said(described, await c.get("/v1/models/other")) == 404
            assert (await c.get("/openapi.json")).json() == document(
                read_card(s.directory), "tiny", chat=True, running=s.router.service.limits.running
            )
            for body, status in (({"prompt": ""}, 400), ({"prompt": "x", "model": "y"}, 404), ({"prompt": "x" * 2000}, 413)):
                assert said(described, await c.post(COMPLETION, json=body), "post") == status
            for method, path, status in (("GET", COMPLETION, 405), ("PUT", "/health", 405), ("GET", "/nothing", 404)):
                answer = await c.request(method, path)
                assert answer.status_code == status
                assert (status == 405) == ("allow" in answer.headers)
                validator(described, "#/components/schemas/ErrorFormat").validate(answer.json())
        async with site(limits=LimitsSection(running=1)) as s, httpx.AsyncClient(base_url=s.url) as c:
            s.workers["p0"].hold.clear()
            waiting = asyncio.create_task(c.post(COMPLETION, json=asked[0][1]))
            await s.until(lambda: s.workers["p0"].books)
            assert said(described, await c.post(COMPLETION, json=asked[0][1]), "post") == 429
            s.workers["p0"].hold.set()
            assert said(described, await waiting, "post") == 200
        async with site(prefill=0, decode=0) as s, httpx.AsyncClient(base_url=s.url) as c:
            assert said(described, await c.get("/health")) == 503
            assert said(described, await c.get("/live")) == 200
            assert said(described, await c.post(COMPLETION, json=asked[0][1]), "post") == 503

    asyncio.run(check())

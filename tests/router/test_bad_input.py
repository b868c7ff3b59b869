"""Everything a client can get wrong: one clear error that names the field, or a cut by a limit; afterwards nothing is left open."""

import asyncio
import json
import socket
from functools import partial

import grpc
import httpx
import pytest
from diptych.core.config import LimitsSection
from diptych.core.errors import DiptychError, InvalidRequest
from diptych.core.generate import Generate
from diptych.core.sampling import SamplingParams
from diptych.router.bodies import ChatBody, CompletionBody, parse_body
from diptych.rpc.inference import InferenceClient
from hypothesis import given, settings
from hypothesis import strategies as st

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "x"}]
HUGE = 10**9

BAD = [
    (COMPLETION, {"prompt": ""}, 400, "prompt"),
    (COMPLETION, {"prompt": []}, 400, "prompt"),
    (COMPLETION, {}, 400, "prompt"),
    (COMPLETION, {"prompt": None}, 400, "prompt"),
    (COMPLETION, {"prompt": 5}, 400, "prompt"),
    (COMPLETION, {"prompt": ["a", "b"]}, 400, "prompt"),
    (COMPLETION, {"prompt": [1, True]}, 400, "prompt"),
    (COMPLETION, {"prompt": [1, 2.5]}, 400, "prompt"),
    (COMPLETION, {"prompt": [1, 512]}, 400, "prompt"),
    (COMPLETION, {"prompt": [-1]}, 400, "prompt"),
    (COMPLETION, {"prompt": "x" * 256}, 400, "prompt"),
    (COMPLETION, {"prompt": "x" * 210}, 400, "prompt"),
    (COMPLETION, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    (COMPLETION, {"prompt": "x", "max_tokens": HUGE}, 400, "max_tokens"),
    (COMPLETION, {"prompt": "x", "max_tokens": 10**30}, 400, "max_tokens"),
    (COMPLETION, {"prompt": "x", "max_tokens": 257}, 400, "max_tokens"),
    (COMPLETION, {"prompt": "x", "max_tokens": 5.5}, 400, "max_tokens"),
    (COMPLETION, {"prompt": "x", "max_tokens": "5"}, 400, "max_tokens"),
    (COMPLETION, {"prompt": "x", "max_tokens": True}, 400, "max_tokens"),
    (COMPLETION, {"prompt": "x", "temperature": -1}, 400, "temperature"),
    (COMPLETION, '{"prompt": "x", "temperature": NaN}', 400, "temperature"),
    (COMPLETION, '{"prompt": "x", "temperature": 1e999}', 400, "temperature"),
    (COMPLETION, {"prompt": "x", "temperature": 10**400}, 400, "temperature"),
    (COMPLETION, {"prompt": "x", "top_p": 0}, 400, "top_p"),
    (COMPLETION, {"prompt": "x", "top_p": 1.1}, 400, "top_p"),
    (COMPLETION, {"prompt": "x", "top_k": -1}, 400, "top_k"),
    (COMPLETION, {"prompt": "x", "seed": -1}, 400, "seed"),
    (COMPLETION, {"prompt": "x", "logprobs": 21}, 400, "logprobs"),
    (COMPLETION, {"prompt": "x", "stop": ["a"] * 17}, 400, "stop"),
    (COMPLETION, {"prompt": "x", "stop": [""]}, 400, "stop"),
    (COMPLETION, {"prompt": "x", "stop": "a" * 257}, 400, "stop"),
    (COMPLETION, {"prompt": "x", "stop": [1]}, 400, "stop.0"),
    (COMPLETION, {"prompt": "x", "stop_token_ids": [512]}, 400, "stop_token_ids"),
    (COMPLETION, {"prompt": "x", "n": 0}, 400, "n"),
    (COMPLETION, {"prompt": "x", "n": 17}, 400, "n"),
    (COMPLETION, {"prompt": "x", "n": "2"}, 400, "n"),
    (COMPLETION, {"prompt": "x", "n": True}, 400, "n"),
    (COMPLETION, {"prompt": "x", "echo": True}, 400, "echo"),
    (COMPLETION, {"prompt": "x", "suffix": "y"}, 400, "suffix"),
    (COMPLETION, {"prompt": "x", "best_of": 3}, 400, "best_of"),
    (COMPLETION, {"prompt": "x", "best_of": 2, "n": 2}, 400, "best_of"),
    (COMPLETION, {"prompt": "x", "logit_bias": {"512": 1}}, 400, "logit_bias"),
    (COMPLETION, {"prompt": "x", "logit_bias": {"5": 101}}, 400, "logit_bias"),
    (COMPLETION, {"prompt": "x", "logit_bias": {"5": "1"}}, 400, "logit_bias.5"),
    (COMPLETION, {"prompt": "x", "logit_bias": {"5": 1, "05": 1}}, 400, "logit_bias"),
    (COMPLETION, {"prompt": "x", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    (COMPLETION, {"prompt": "x", "logit_bias": {"9" * 5000: 1}}, 400, "logit_bias"),
    (COMPLETION, {"prompt": "x", "logit_bias": [[5, 1]]}, 400, "logit_bias"),
    (COMPLETION, {"prompt": "x", "presence_penalty": 2.5}, 400, "presence_penalty"),
    (COMPLETION, {"prompt": "x", "frequency_penalty": "1"}, 400, "frequency_penalty"),
    (COMPLETION, {"prompt": "x", "repetition_penalty": 0}, 400, "repetition_penalty"),
    (COMPLETION, {"prompt": "x", "min_p": 1.5}, 400, "min_p"),
    (COMPLETION, {"prompt": "x", "max_tokens": 5, "min_tokens": 257}, 400, "min_tokens"),
    (COMPLETION, {"prompt": "x", "stream_options": {"x": 1}}, 400, "stream_options.x"),
    (COMPLETION, {"prompt": "x", "model": "other"}, 404, "model"),
    (COMPLETION, '{"prompt": "a\\ud800b"}', 400, "prompt"),
    (COMPLETION, '{"prompt": "x", "stop": "a\\udfff"}', 400, "stop"),
    (COMPLETION, '{"prompt": "x", "model": "\\ud800"}', 400, "model"),
    (COMPLETION, '{"prompt": "x", "\\ud800": 1}', 400, "\ud800"),
    (COMPLETION, b'{"prompt": "\xff"}', 400, "body"),
    (COMPLETION, b"", 400, "body"),
    (COMPLETION, b"[1]", 400, "body"),
    (COMPLETION, b"{", 400, "body"),
    (COMPLETION, b"[" * 100_000, 400, "body"),
    (COMPLETION, b'{"prompt": ' + b"9" * 5000 + b"}", 400, "body"),
    (COMPLETION, b"x" * 100_001, 413, "body"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": MESSAGES, "min_tokens": HUGE}, 400, "min_tokens"),
    (CHAT, {"messages": "x"}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    (CHAT, {"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "name": "y"}]}, 400, "messages.0.name"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content.0.type"),
    (CHAT, '{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "messages"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 0, "max_completion_tokens": 5}, 400, "max_tokens"),
    (CHAT, {"messages": MESSAGES, "max_completion_tokens": HUGE}, 400, "max_completion_tokens"),
    (CHAT, {"messages": MESSAGES, "n": HUGE}, 400, "n"),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 3}, 400, "top_logprobs"),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, 400, "logprobs"),
    (CHAT, {"messages": MESSAGES, "tools": [{}]}, 400, "tools"),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object"}}, 400, "response_format"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 300}]}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 190}]}, 400, "messages"),
]


def test_each_bad_body_is_refused_by_the_name_of_its_field(site):
    async def check():
        async with site(limits=LimitsSection(body_bytes=100_000)) as s, httpx.AsyncClient(base_url=s.url) as c:
            for path, body, status, field in BAD:
                content = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
                answer = await c.post(path, content=content)
                shown = (path, content[:80], answer.text)
                assert answer.status_code == status, shown
                assert answer.json()["error"]["param"] == field, shown
                assert len(answer.json()["error"]["message"]) < 6000
            refused = sum(n for (name, *_), n in s.recorder.values.items() if name == "diptych_requests_total")
            assert refused == len(BAD)
            assert not s.workers["p0"].seen
            assert not s.workers["d0"].seen
            good = {"prompt": "x", "n": 1, "user": "me", "presence_penalty": 0, "stop": None, "logit_bias": {}, "max_tokens": 3}
            assert (await c.post(COMPLETION, json=good)).json()["choices"][0]["text"] == "Hel"

    asyncio.run(check())


BAD_CALLS = [
    (Generate(""), "prompt"),
    (Generate(()), "prompt"),
    (Generate((512,)), "prompt"),
    (Generate("x" * 300), "prompt"),
    (Generate("x", model="other"), "model"),
    (Generate("x", stop=("",)), "stop"),
    (Generate("x", request_id="a\nb"), "request_id"),
    (Generate("x", sampling=SamplingParams(max_tokens=0)), "max_tokens"),
    (Generate("x", sampling=SamplingParams(n=0)), "n"),
    (Generate("x", sampling=SamplingParams(n=17)), "n"),
    (Generate("x", sampling=SamplingParams(max_tokens=HUGE)), "max_tokens"),
    (Generate("x", sampling=SamplingParams(temperature=-1)), "temperature"),
    (Generate("x", sampling=SamplingParams(temperature=float("nan"))), "temperature"),
]


def test_each_bad_call_over_grpc_too(site):
    async def check():
        async with site() as s, InferenceClient(s.router.grpc) as c:
            for call, field in BAD_CALLS:
                with pytest.raises(DiptychError) as refused:
                    await anext(c.generate(call))
                assert refused.value.field == field, (call, refused.value)
            chunks = [chunk async for chunk in c.generate(Generate("y" * 20, sampling=SamplingParams(max_tokens=5)))]
            assert "".join(chunk.text for chunk in chunks) == "Hello"
            assert chunks[-1].finish.timing.transport == "shm"

    asyncio.run(check())


def test_garbage_on_the_ports(site):
    def throw(port, data):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(data)
            return connection.recv(200)

    def call_grpc(address, data):
        with grpc.insecure_channel(address) as channel:
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_stream("/diptych.v1.Inference/Generate")(data, timeout=60).next()
            return refused.value.code()

    async def check():
        async with site() as s, httpx.AsyncClient(base_url=s.url) as c:
            http, rpc = (int(address.rsplit(":", 1)[1]) for address in (s.router.http, s.router.grpc))
            assert b"400" in await asyncio.to_thread(throw, http, b"\x00\xff" * 100 + b"\r\n\r\n")
            assert b"400" in await asyncio.to_thread(throw, http, b"POST / HTTP/1.1\r\ncontent-length: -5\r\n\r\n")
            await asyncio.to_thread(throw, rpc, b"GET / HTTP/1.1\r\n\r\n" + b"\x00\xff" * 100)
            code = await asyncio.to_thread(call_grpc, s.router.grpc, b"\xff\xff\xff\xff")
            assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)
            assert (await c.post(COMPLETION, json={"prompt": "x" * 20, "max_tokens": 2})).json()["choices"][0]["text"] == "He"

    asyncio.run(check())


@pytest.mark.parametrize("announced", [True, False])
def test_ten_megabytes_are_refused_and_the_connection_goes_on(site, announced):
    async def pieces():
        for _ in range(160):
            yield b"x" * 65536

    async def check():
        async with site() as s, httpx.AsyncClient(base_url=s.url) as c:
            for _ in range(2):
                answer = await c.post(COMPLETION, content=b"x" * (10 << 20) if announced else pieces())
                assert answer.status_code == 413
                assert answer.json()["error"]["param"] == "body"
            assert (await c.post(COMPLETION, json={"prompt": "x" * 20, "max_tokens": 2})).status_code == 200
            with pytest.raises(DiptychError):
                async with InferenceClient(s.router.grpc) as client:
                    await anext(client.generate(Generate("x" * (10 << 20))))

    asyncio.run(check())


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize("half", [b"", b"POST /v1", HEAD, HEAD + b"content-length: 100\r\n\r\n{"])
def test_half_a_request_is_cut(site, half):
    def wait_for_cut(port):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(half)
            try:
                return connection.recv(100)
            except ConnectionResetError:
                return b""

    async def check():
        async with site(prefill=0, decode=0, limits=LimitsSection(write_s=0.3)) as s:
            assert await asyncio.to_thread(wait_for_cut, int(s.router.http.rsplit(":", 1)[1])) == b""

    asyncio.run(check())


def was_cut(connection):
    try:
        connection.send(b" ")
    except BlockingIOError:
        return False
    except (BrokenPipeError, ConnectionResetError):
        return True
    return False


def test_a_client_that_never_reads_is_cut(site):
    """The system's buffers swallow what fits; from then on the client has `limits.write_s`."""
    asked = json.dumps({"prompt": "x" * 20, "max_tokens": 150, "stream": True, "logprobs": 20, "ignore_eos": True})

    async def check():
        async with site(limits=LimitsSection(write_s=0.5)) as s:
            s.workers["d0"].step_s = 0.002
            port = int(s.router.http.rsplit(":", 1)[1])
            with socket.socket() as deaf:
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                deaf.connect(("127.0.0.1", port))
                request = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(asked), asked.encode())
                deaf.sendall(request * 40)
                deaf.setblocking(False)
                await s.until(partial(was_cut, deaf), timeout_s=30)
                assert len(s.workers["d0"].seen) < 40

    asyncio.run(check())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(sorted({*CompletionBody.model_fields, *ChatBody.model_fields, *CompletionBody.neutral, *ChatBody.neutral, "x"}))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(FIELDS, json_values, max_size=4), st.sampled_from([CompletionBody, ChatBody]))
def test_any_body_is_taken_or_refused_by_name(values, kind):
    base = {"prompt": "x"} if kind is CompletionBody else {"messages": MESSAGES}
    refused = None
    try:
        parse_body(kind, json.dumps({**base, **values}).encode())
    except InvalidRequest as error:
        refused = error
    assert refused is None or refused.field.split(".")[0] in {*values, "body"}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=50))
def test_any_bytes_are_refused(raw):
    with pytest.raises(InvalidRequest) as refused:
        parse_body(CompletionBody, raw)
    assert refused.value.field

"""Several choices per request, through every face, over fake workers and real gRPC: choice i of a fake is its text from character i on."""

import asyncio
import json

import httpx
import openai
import pytest
from diptych.client.aio import AsyncClient
from diptych.core.config import LimitsSection
from diptych.core.errors import InvalidRequest, Overloaded
from diptych.core.generate import Generate
from diptych.core.request import FinishReason
from diptych.core.sampling import SamplingParams
from diptych.router.times import Times
from diptych.rpc.inference import InferenceClient

TEXT = "Hello, wörld! And so on."
PROMPT = "x" * 20
MESSAGES = [{"role": "user", "content": "Please say hello"}]


def client(site):
    return openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)


def parts(chunks, text_of):
    """Of each choice: its text, and the reasons it was given."""
    texts, reasons = {}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (text_of(choice) or "")
            reasons.setdefault(choice.index, []).extend([choice.finish_reason] if choice.finish_reason else [])
    return [texts[i] for i in sorted(texts)], [reasons[i] for i in sorted(reasons)]


def test_a_whole_completion_has_all_choices(site):
    async def check():
        async with site() as s, client(s) as c:
            answer = await c.completions.create(model="tiny", prompt=PROMPT, n=3, max_tokens=6, logprobs=1)
            assert [choice.index for choice in answer.choices] == [0, 1, 2]
            assert [choice.text for choice in answer.choices] == [TEXT[:6], TEXT[1:7], TEXT[2:8]]
            assert {choice.finish_reason for choice in answer.choices} == {"length"}
            assert [choice.logprobs.text_offset for choice in answer.choices] == [[*range(6)]] * 3
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (21, 18)
            (prefill,), (decode,) = s.workers["p0"].seen, s.workers["d0"].seen
            assert prefill.attempt_id == decode.attempt_id
            assert s.recorder.values["diptych_requests_total", "length"] == 1
            assert s.recorder.values["vllm:generation_tokens_total",] == 18
            assert s.recorder.values["diptych_kv_transfer_bytes_total", "shm"] == 1000

    asyncio.run(check())


def test_a_streamed_completion_tells_the_choices_apart(site):
    async def check():
        async with site() as s, client(s) as c:
            options = {"include_usage": True, "continuous_usage_stats": True}
            stream = await c.completions.create(model="tiny", prompt=PROMPT, n=3, max_tokens=6, stream=True, stream_options=options)
            chunks = [chunk async for chunk in stream]
            assert parts(chunks, lambda choice: choice.text) == ([TEXT[:6], TEXT[1:7], TEXT[2:8]], [["length"]] * 3)
            assert [chunk.usage.completion_tokens for chunk in chunks][-1] == 18
            assert chunks[-1].choices == []
            assert all(len(chunk.choices) == 1 for chunk in chunks[:-1])

    asyncio.run(check())


def test_chats_have_choices_too(site):
    async def check():
        async with site() as s, client(s) as c:
            for worker in s.workers.values():
                worker.end_after = 5
            answer = await c.chat.completions.create(model="tiny", messages=MESSAGES, n=2, logprobs=True)
            assert [choice.message.content for choice in answer.choices] == ["Hello", "ello,"]
            assert ["".join(entry.token for entry in choice.logprobs.content) for choice in answer.choices] == ["Hello", "ello,"]
            assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
            stream = await c.chat.completions.create(model="tiny", messages=MESSAGES, n=2, stream=True)
            chunks = [chunk async for chunk in stream]
            assert [(chunk.choices[0].index, chunk.choices[0].delta.role) for chunk in chunks[:2]] == [(0, "assistant"), (1, "assistant")]
            assert parts(chunks, lambda choice: choice.delta.content) == (["Hello", "ello,"], [["stop"], ["stop"]])

    asyncio.run(check())


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_its_own_choice(site, stream):
    """Tokens are single characters here, so that every stop string crosses token borders."""

    async def check():
        async with site() as s, client(s) as c:
            s.workers["d0"].step_s = 0.02
            asked = {"model": "tiny", "prompt": PROMPT, "n": 4, "max_tokens": 20, "stop": ["llo, w", "lo, wörld! A"]}
            answer = await c.completions.create(**asked, stream=stream)
            if stream:
                texts, reasons = parts([chunk async for chunk in answer], lambda choice: choice.text)
            else:
                texts, reasons = [choice.text for choice in answer.choices], [[choice.finish_reason] for choice in answer.choices]
            assert texts == ["He", "e", "", ""]
            assert reasons == [["stop"]] * 4
            await s.idle()
            (attempt,) = {command.attempt_id for command in s.workers["d0"].seen}
            assert s.workers["d0"].halted == {(attempt, choice) for choice in range(3)}
            assert s.workers["d0"].stopped == [attempt]

    asyncio.run(check())


def test_one_choice_stops_and_the_others_go_on(site):
    async def check():
        async with site() as s, client(s) as c:
            s.workers["d0"].step_s = 0.01
            answer = await c.completions.create(model="tiny", prompt=PROMPT, n=3, max_tokens=12, stop="ö")
            assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [(TEXT[i:8], "stop") for i in range(3)]
            answer = await c.completions.create(model="tiny", prompt=PROMPT, n=3, max_tokens=12, stop="Hello")
            assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [
                ("", "stop"), (TEXT[1:12], "length"), (TEXT[2:13], "length")
            ]  # fmt: skip
            assert s.recorder.values["diptych_requests_total", "stop"] == 1
            assert s.recorder.values["diptych_requests_total", "length"] == 1

    asyncio.run(check())


def test_over_grpc_each_choice_ends_once_and_the_call_with_its_last_message(site):
    async def check():
        async with site() as s, InferenceClient(s.router.grpc) as c:
            call = Generate(PROMPT, sampling=SamplingParams(max_tokens=6, n=3), stop=("o, w",))
            chunks = [chunk async for chunk in c.generate(call)]
            assert [chunk.finish is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
            for choice, (text, reason) in enumerate([("Hello,", "length"), ("ello, ", "length"), ("ll", "stop")]):
                mine = [chunk for chunk in chunks if chunk.choice == choice and (chunk.tokens or chunk.reason)]
                assert "".join(chunk.text for chunk in mine) == text
                assert [chunk.reason for chunk in mine] == [None] * (len(mine) - 1) + [FinishReason(reason)]
                tokens = [token for chunk in mine for token in chunk.tokens]
                assert [(token.index, token.choice) for token in tokens] == [(i, choice) for i in range(6)]
            assert chunks[-1].finish.usage.output_tokens == 18

    asyncio.run(check())


def test_the_client_gathers_choices(site):
    async def check():
        async with site() as s, AsyncClient(s.router.grpc) as c:
            answer = await c.generate(PROMPT, n=3, max_tokens=5)
            assert [choice.text for choice in answer.choices] == [TEXT[:5], TEXT[1:6], TEXT[2:7]]
            assert answer.text == TEXT[:5]
            assert answer.usage.output_tokens == 15

    asyncio.run(check())


def test_one_token_of_each_choice_is_for_p_alone(site):
    async def check():
        async with site() as s, AsyncClient(s.router.grpc) as c:
            answer = await c.generate(PROMPT, n=4, max_tokens=1)
            assert [choice.text for choice in answer.choices] == list("Hell")
            assert (answer.timing.decode_worker, answer.timing.tpot) == ("", None)
            assert not s.workers["d0"].seen

    asyncio.run(check())


def test_a_retry_takes_up_every_choice_where_it_was(site):
    async def check():
        async with site(decode=2) as s, AsyncClient(s.router.grpc) as c:
            decodes = [s.workers["d0"], s.workers["d1"]]
            for worker in decodes:
                worker.step_s = 0.05
            asked = asyncio.create_task(c.generate(PROMPT, n=3, max_tokens=20, stop="llo, w"))
            await s.until(lambda: any(worker.halted for worker in decodes))
            dead, other = sorted(decodes, key=lambda worker: not worker.halted)
            dead.hold.clear()
            del s.workers[dead.name]
            await dead.kill()
            answer = await asked
            assert answer.timing.attempts == 2
            assert [(choice.text, len(choice.tokens)) for choice in answer.choices] == [("He", 8), ("e", 7), ("", 6)]
            (retry,) = other.seen
            assert 2 in retry.request.finished
            assert 0 not in retry.request.finished
            assert (
                retry.request.generated_by(0) == tuple(token.id for token in answer.choices[0].tokens)[: len(retry.request.generated_by(0))]
            )
            assert len(retry.request.generated_by(0)) >= 5

    asyncio.run(check())


def test_choices_count_against_the_limit_of_requests(site):
    async def check():
        async with site(limits=LimitsSection(running=4)) as s, AsyncClient(s.router.grpc) as c, httpx.AsyncClient(base_url=s.url) as web:
            with pytest.raises(InvalidRequest) as refused:
                await c.generate(PROMPT, n=5)
            assert refused.value.field == "n"
            s.workers["p0"].hold.clear()
            asked = asyncio.create_task(c.generate(PROMPT, n=3, max_tokens=3))
            await s.until(lambda: s.workers["p0"].books)
            with pytest.raises(Overloaded):
                await c.generate(PROMPT, n=2)
            assert s.recorder.values["diptych_requests_total", "overloaded"] == 1
            one = asyncio.create_task(c.generate(PROMPT, max_tokens=3))
            await s.until(lambda: len(s.workers["p0"].books) == 2)
            body = json.dumps({"prompt": PROMPT})
            assert (await web.post("/v1/completions", content=body)).status_code == 429
            s.workers["p0"].hold.set()
            assert len((await asked).choices) == 3
            await one
            assert len((await c.generate(PROMPT, n=4, max_tokens=2)).choices) == 4

    asyncio.run(check())


def test_open_choices_are_load(site):
    async def check():
        async with site(decode=2) as s, AsyncClient(s.router.grpc) as c:
            s.workers["p0"].hold.clear()
            asked = [asyncio.create_task(c.generate(PROMPT, n=8, max_tokens=3))]
            await s.until(lambda: len(s.workers["p0"].books) == 1)
            for more in range(3):
                asked.append(asyncio.create_task(c.generate(PROMPT, max_tokens=3)))
                await s.until(lambda more=more: len(s.workers["p0"].books) == 2 + more)
            assert sorted(len(s.workers[name].seen) for name in ("d0", "d1")) == [1, 3]
            s.workers["p0"].hold.set()
            await asyncio.gather(*asked)

    asyncio.run(check())


class Observed:
    def __init__(self):
        self.seen = []

    def inc(self, name, value=1.0, **labels):
        pass

    def observe(self, name, value, **labels):
        self.seen.append((name, round(value, 6)))


def test_choices_are_timed_apart():
    observed = Observed()
    times = Times(10.0, 3, observed)
    for choice, at in ((0, 11.0), (1, 11.0), (1, 12.0), (0, 13.0), (0, 14.0), (2, 14.5)):
        times.token(choice, at, handed_over=True)
    assert (times.ttft, times.handover_gap, times.tokens) == (1.0, 1.0, 6)
    assert times.tpot == (1.5 + 1.0) / 2
    assert observed.seen == [
        ("vllm:time_to_first_token_seconds", 1.0),
        ("diptych_handover_gap_seconds", 1.0),
        ("vllm:inter_token_latency_seconds", 1.0),
    ]
